// The kernel for double and for processors without one of their own: vectors of 16 bytes, which the compiler maps to
// what there is (4 rows x 2 vectors, 8 sums in 16 registers).

#define VLPFAST_TARGET
#include "maxsim/tile.h"

#include <cstring>
#include <type_traits>

#define VLPFAST_LANES static inline __attribute__((always_inline))

namespace vlpfast::maxsim {
namespace {

template <class T> struct Portable {
    using Scalar = T;
    static constexpr int width = 16 / sizeof(T), most = 2;
    static constexpr int rows(int) { return 4; }
    typedef T V __attribute__((vector_size(16)));
    struct Places {
        int32_t lane[width];
    };
    struct Mask {
        bool lane[width];
    };

    // f(l) in lane l
    template <class R, class F> VLPFAST_LANES R each(const F& f) {
        R out{};
        for (int l = 0; l < width; ++l) {
            if constexpr (std::is_same_v<R, V>)
                out[l] = f(l);
            else
                out.lane[l] = f(l);
        }
        return out;
    }

    VLPFAST_LANES V set(T value) { return V{} + value; }
    VLPFAST_LANES V load(const T* from) {
        V out;
        std::memcpy(&out, from, sizeof out);
        return out;
    }
    VLPFAST_LANES void store(T* to, V value) { std::memcpy(to, &value, sizeof value); }
    VLPFAST_LANES V multiply_add(V a, V b, V c) { return a * b + c; }
    VLPFAST_LANES V multiply(V a, V b) { return a * b; }
    VLPFAST_LANES V add(V a, V b) { return a + b; }
    VLPFAST_LANES V max(V a, V b) {
        return each<V>([&](int l) { return a[l] > b[l] ? a[l] : b[l]; });
    }
    VLPFAST_LANES Places set_place(int32_t place) {
        return each<Places>([&](int) { return place; });
    }
    VLPFAST_LANES Places load_places(const int32_t* from) {
        return each<Places>([&](int l) { return from[l]; });
    }
    VLPFAST_LANES void store_places(int32_t* to, const Places& places) { std::copy_n(places.lane, width, to); }
    VLPFAST_LANES Mask larger(V value, V old) {
        return each<Mask>([&](int l) { return !(value[l] <= old[l]) && old[l] == old[l]; });
    }
    VLPFAST_LANES V select(const Mask& mask, V yes, V no) {
        return each<V>([&](int l) { return mask.lane[l] ? yes[l] : no[l]; });
    }
    VLPFAST_LANES Places select(const Mask& mask, const Places& yes, const Places& no) {
        return each<Places>([&](int l) { return mask.lane[l] ? yes.lane[l] : no.lane[l]; });
    }
    VLPFAST_LANES V first(V value, int64_t count, T rest) {
        return each<V>([&](int l) { return l < count ? value[l] : rest; });
    }
    VLPFAST_LANES T max_lane(V value) {
        T out = value[0];
        for (int l = 1; l < width; ++l)
            out = value[l] > out ? value[l] : out;
        return out;
    }
    VLPFAST_LANES uint64_t is_nan(V value) {
        return bits(each<Mask>([&](int l) { return value[l] != value[l]; }));
    }
    VLPFAST_LANES uint64_t equal(V a, V b) {
        return bits(each<Mask>([&](int l) { return a[l] == b[l]; }));
    }
    VLPFAST_LANES uint64_t bits(const Mask& mask) {
        uint64_t out = 0;
        for (int l = 0; l < width; ++l)
            out |= static_cast<uint64_t>(mask.lane[l]) << l;
        return out;
    }
};

} // namespace

template <class T> const Kernel<T>* portable_kernel() {
    using L = Portable<T>;
    static constexpr Kernel<T> kernel{L::width, L::width * L::most, run<L>};
    return &kernel;
}
template const Kernel<float>* portable_kernel();
template const Kernel<double>* portable_kernel();

} // namespace vlpfast::maxsim

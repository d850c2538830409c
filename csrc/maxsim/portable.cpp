// The kernel in plain C++, for double and for processors without a kernel of their own: 4 numbers to a vector, which
// the compiler maps to what there is.

#define VLPFAST_TARGET
#include "maxsim/tile.h"

#define VLPFAST_LANES static inline __attribute__((always_inline))

namespace vlpfast::maxsim {
namespace {

template <class T> struct Portable {
    using Scalar = T;
    static constexpr int width = 4, most = 2;
    static constexpr int rows(int) { return 4; }
    template <class E> struct Array {
        E lane[width];
    };
    using V = Array<T>;
    using Places = Array<int32_t>;
    using Mask = Array<bool>;

    // Lane l of the result is f(l).
    template <class E, class F> VLPFAST_LANES Array<E> each(const F& f) { return {{f(0), f(1), f(2), f(3)}}; }
    template <class F> VLPFAST_LANES uint64_t bits(const F& f) {
        return uint64_t(f(0)) | uint64_t(f(1)) << 1 | uint64_t(f(2)) << 2 | uint64_t(f(3)) << 3;
    }

    VLPFAST_LANES V set(T value) {
        return each<T>([&](int) { return value; });
    }
    VLPFAST_LANES V load(const T* from) {
        return each<T>([&](int l) { return from[l]; });
    }
    VLPFAST_LANES void store(T* to, const V& value) { std::copy_n(value.lane, width, to); }
    VLPFAST_LANES V multiply_add(const V& a, const V& b, const V& c) {
        return each<T>([&](int l) { return a.lane[l] * b.lane[l] + c.lane[l]; });
    }
    VLPFAST_LANES V add(const V& a, const V& b) {
        return each<T>([&](int l) { return a.lane[l] + b.lane[l]; });
    }
    VLPFAST_LANES V max(const V& a, const V& b) {
        return each<T>([&](int l) { return a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l]; });
    }
    VLPFAST_LANES Places set_place(int32_t place) {
        return each<int32_t>([&](int) { return place; });
    }
    VLPFAST_LANES Places load_places(const int32_t* from) {
        return each<int32_t>([&](int l) { return from[l]; });
    }
    VLPFAST_LANES void store_places(int32_t* to, const Places& places) { std::copy_n(places.lane, width, to); }
    VLPFAST_LANES Mask larger(const V& value, const V& old) {
        return each<bool>([&](int l) { return !(value.lane[l] <= old.lane[l]) && old.lane[l] == old.lane[l]; });
    }
    template <class E> VLPFAST_LANES Array<E> select(const Mask& mask, const Array<E>& yes, const Array<E>& no) {
        return each<E>([&](int l) { return mask.lane[l] ? yes.lane[l] : no.lane[l]; });
    }
    VLPFAST_LANES V first(const V& value, int64_t count, T rest) {
        return each<T>([&](int l) { return l < count ? value.lane[l] : rest; });
    }
    VLPFAST_LANES T max_lane(const V& value) { return *std::max_element(value.lane, value.lane + width); }
    VLPFAST_LANES uint64_t is_nan(const V& value) {
        return bits([&](int l) { return value.lane[l] != value.lane[l]; });
    }
    VLPFAST_LANES uint64_t equal(const V& a, const V& b) {
        return bits([&](int l) { return a.lane[l] == b.lane[l]; });
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

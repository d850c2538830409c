// Which form of the kernel this processor takes.

#include "maxsim/kernel.h"

#include <cstdlib>
#include <string_view>
#include <type_traits>

namespace vlpfast::maxsim {

template <class T> const Kernel<T>& kernel_here() {
    if constexpr (std::is_same_v<T, float>) {
        static const Kernel<float>* const found = [] {
            const char* const variable = std::getenv("ATEN_CPU_CAPABILITY");
            const std::string_view limit = variable ? variable : "";
            const Kernel<float>* widest = limit == "default" || limit == "avx2" ? nullptr : avx512_kernel();
            if (!widest && limit != "default")
                widest = avx2_kernel();
            return widest ? widest : portable_kernel<float>();
        }();
        return *found;
    } else {
        return *portable_kernel<T>();
    }
}
template const Kernel<float>& kernel_here();
template const Kernel<double>& kernel_here();

} // namespace vlpfast::maxsim

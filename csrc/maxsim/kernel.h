// The inner kernel of late interaction and who makes it: one form for each instruction set, chosen at run time.
#pragma once

#include <cstdint>

namespace vlpfast::maxsim {

// One panel of tokens ("lanes", side by side in memory) against the tokens of one set ("rows").
template <class T> struct Job {
    const T* panel; // [width][lanes, up to a multiple of Kernel::lane]
    int64_t lanes;
    const T* rows; // row r at rows + r * stride, width numbers one after the other
    int64_t stride, count, width;
    const T* scale; // [count] what each row's products are multiplied by; null: nothing
    T* lane_best;   // [lanes, up to a multiple] each lane's largest product, and the row of it
    int32_t* lane_place;
    T* row_best; // [count] each row's largest product so far, which a lane of this panel may exceed; null: not wanted
    int32_t* row_place;
    int32_t first_lane; // what the panel's lane 0 is called in row_place
};

template <class T> struct Kernel {
    int64_t lane;  // a panel is padded to a multiple of so many lanes
    int64_t panel; // the most lanes of a panel
    void (*run)(const Job<T>&);
};

// Null where the compiler or the processor has it not.
const Kernel<float>* avx512_kernel();
const Kernel<float>* avx2_kernel();
template <class T> const Kernel<T>* portable_kernel();

// The widest of this processor, at most what the variable names by which torch chooses its own. Late interaction and
// the matching of tokens (csrc/tokens) take it.
template <class T> const Kernel<T>& kernel_here();

} // namespace vlpfast::maxsim

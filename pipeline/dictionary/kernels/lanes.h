// What the kernels for a CPU compute with: vectors of one size whatever the machine has, rows in float32 or bfloat16.
//
// Nothing depends on the number of threads: each token, or each feature, is one thread's from beginning to end, and
// sums run in a fixed order. Products and sums of one row are made in 64 lanes whatever the machine has, so that
// machines with and without AVX-512 agree to the bit.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(_WIN32)
#define KILOBASIS extern "C" __declspec(dllexport)
#else
#define KILOBASIS extern "C" __attribute__((visibility("default")))
#endif

namespace {

typedef float Lanes __attribute__((vector_size(64)));
constexpr int64_t WIDE = 16;

inline Lanes load(const float* at) {
    Lanes lanes;
    std::memcpy(&lanes, at, sizeof lanes);
    return lanes;
}

// Rows of a dictionary are float32 or bfloat16; what is computed with them is float32.
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));

inline Lanes load(const uint16_t* at) {
#ifdef __AVX512F__
    // What compilers make of the lines below is four times as long.
    return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at)), 16);
#else
    Halves halves;
    std::memcpy(&halves, at, sizeof halves);
    Words words = __builtin_convertvector(halves, Words) << 16;
    Lanes lanes;
    std::memcpy(&lanes, &words, sizeof lanes);
    return lanes;
#endif
}

inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 64);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float from_bf16(uint16_t half) {
    uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float number(float value) { return value; }
inline float number(uint16_t half) { return from_bf16(half); }

inline void store(float* at, Lanes lanes) { std::memcpy(at, &lanes, sizeof lanes); }

inline Lanes all(float value) { return Lanes{} + value; }

inline float total(Lanes lanes) {
#ifdef __AVX512F__
    // Adds the same pairs.
    return _mm512_reduce_add_ps((__m512)lanes);
#else
    float sums[WIDE];
    store(sums, lanes);
    for (int64_t half = WIDE / 2; half; half /= 2)
        for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
    return sums[0];
#endif
}

// The inner product that decides which features fire: always the same sums in the same order.
template <typename W> inline float dot(const float* a, const W* b, int64_t d) {
    Lanes s0{}, s1{}, s2{}, s3{};
    int64_t i = 0;
    for (; i + 4 * WIDE <= d; i += 4 * WIDE) {
        s0 += load(a + i) * load(b + i);
        s1 += load(a + i + WIDE) * load(b + i + WIDE);
        s2 += load(a + i + 2 * WIDE) * load(b + i + 2 * WIDE);
        s3 += load(a + i + 3 * WIDE) * load(b + i + 3 * WIDE);
    }
    for (; i + WIDE <= d; i += WIDE) s0 += load(a + i) * load(b + i);
    float sum = total((s0 + s1) + (s2 + s3));
    for (; i < d; ++i) sum += a[i] * number(b[i]);
    return sum;
}

template <typename W> inline void add_scaled(float* to, const W* from, float scale, int64_t d) {
    int64_t i = 0;
    for (; i + WIDE <= d; i += WIDE) store(to + i, load(to + i) + all(scale) * load(from + i));
    for (; i < d; ++i) to[i] += scale * number(from[i]);
}

// Numbers of a row, sixteen at a time or one: what computes with them is written once, and told which by its first
// argument.
inline Lanes at(Lanes, const float* from) { return load(from); }
inline Lanes at(Lanes, const uint16_t* from) { return load(from); }
inline float at(float, const float* from) { return *from; }
inline float at(float, const uint16_t* from) { return from_bf16(*from); }

inline Lanes put(float* to, Lanes lanes) { return store(to, lanes), lanes; }
inline float put(float* to, float value) { return *to = value; }

template <typename Each> inline void along(int64_t d, Each each) {
    int64_t i = 0;
    for (; i + WIDE <= d; i += WIDE) each(Lanes{}, i);
    for (; i < d; ++i) each(0.0f, i);
}

// The squared norm of a row that is made on the way, summed as `dot` sums it.
template <typename Make> inline float square_of(int64_t d, Make make) {
    Lanes s[4] = {};
    int64_t i = 0;
    for (; i + 4 * WIDE <= d; i += 4 * WIDE)
        for (int64_t c = 0; c < 4; ++c) {
            Lanes made = make(Lanes{}, i + c * WIDE);
            s[c] += made * made;
        }
    for (; i + WIDE <= d; i += WIDE) {
        Lanes made = make(Lanes{}, i);
        s[0] += made * made;
    }
    float sum = total((s[0] + s[1]) + (s[2] + s[3]));
    for (; i < d; ++i) {
        float made = make(0.0f, i);
        sum += made * made;
    }
    return sum;
}

// Rows are gathered from all over memory: ask for one while others are worked on.
constexpr int64_t AHEAD = 2;

template <typename W> inline void fetch(const W* row, int64_t d) {
    for (int64_t i = 0; i < d; i += 64 / int64_t(sizeof(W))) __builtin_prefetch(row + i);
}

} // namespace

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
#include <type_traits>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(_WIN32)
#define KILOBASIS extern "C" __declspec(dllexport)
#else
#define KILOBASIS extern "C" __attribute__((visibility("default")))
#endif

namespace {

// Sixteen numbers: one register of AVX-512, two of AVX, four of smaller machines. They are made of registers here: what a
// compiler makes of a vector that is longer than its registers goes through memory at every step.
template <typename Part> struct Two {
    Part low, high;
};

template <typename T, typename R> using If = std::enable_if_t<std::is_arithmetic<T>::value, R>;

#define KILOBASIS_EACH(op)                                                                                            \
    template <typename P> inline Two<P> operator op(const Two<P>& a, const Two<P>& b) {                               \
        return {a.low op b.low, a.high op b.high};                                                                    \
    }                                                                                                                 \
    template <typename P, typename T> inline If<T, Two<P>> operator op(const Two<P>& a, T b) {                        \
        return {a.low op b, a.high op b};                                                                             \
    }                                                                                                                 \
    template <typename P, typename T> inline If<T, Two<P>> operator op(T a, const Two<P>& b) {                        \
        return {a op b.low, a op b.high};                                                                             \
    }                                                                                                                 \
    template <typename P, typename T> inline Two<P>& operator op##=(Two<P>& a, const T& b) { return a = a op b; }
KILOBASIS_EACH(+)
KILOBASIS_EACH(-)
KILOBASIS_EACH(*)
KILOBASIS_EACH(^)
#undef KILOBASIS_EACH
template <typename P> inline Two<P> operator>>(const Two<P>& a, int bits) { return {a.low >> bits, a.high >> bits}; }

constexpr int64_t WIDE = 16;

typedef float Floats4 __attribute__((vector_size(16)));
typedef uint32_t Words4 __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef uint32_t Words8 __attribute__((vector_size(32)));
#if defined(__AVX512F__)
typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
#elif defined(__AVX2__)
typedef Two<Floats8> Lanes;
typedef Two<Words8> Words;
#else
typedef Two<Two<Floats4>> Lanes;
typedef Two<Two<Words4>> Words;
#endif

// Bytes in memory, as registers.
template <typename V> struct Memory {
    template <typename T> static V load(const T* at) {
        V made;
        std::memcpy(&made, at, sizeof made);
        return made;
    }
    template <typename T> static void store(T* at, const V& v) { std::memcpy(at, &v, sizeof v); }
};
template <typename P> struct Memory<Two<P>> {
    template <typename T> static Two<P> load(const T* at) {
        return {Memory<P>::load(at), Memory<P>::load(at + sizeof(P) / sizeof(T))};
    }
    template <typename T> static void store(T* at, const Two<P>& v) {
        Memory<P>::store(at, v.low);
        Memory<P>::store(at + sizeof(P) / sizeof(T), v.high);
    }
};

inline Lanes load(const float* at) { return Memory<Lanes>::load(at); }

inline void store(float* at, const Lanes& lanes) { Memory<Lanes>::store(at, lanes); }

template <typename To, typename From> inline To as(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// Rows of a dictionary are float32 or bfloat16; what is computed with them is float32.
inline Lanes load(const uint16_t* at) {
#if defined(__AVX512F__)
    // What compilers make of the lines below is four times as long.
    return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at)), 16);
#elif defined(__AVX2__)
    auto half = [&](const uint16_t* from) {
        return (Floats8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
    };
    return {half(at), half(at + WIDE / 2)};
#else
    uint32_t words[WIDE];
    for (int64_t i = 0; i < WIDE; ++i) words[i] = uint32_t(at[i]) << 16;
    return Memory<Lanes>::load(words);
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

inline Lanes all(float value) { return Lanes{} + value; }

// a b + c, rounded once where a machine can: said outright where compilers would not all do the same.
#if defined(__AVX512F__)
inline Lanes fused(const Lanes& a, const Lanes& b, const Lanes& c) {
    return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#elif defined(__AVX2__) && defined(__FMA__)
inline Floats8 fused(Floats8 a, Floats8 b, Floats8 c) { return (Floats8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
inline Floats4 fused(Floats4 a, Floats4 b, Floats4 c) { return a * b + c; }
#endif
template <typename P> inline Two<P> fused(const Two<P>& a, const Two<P>& b, const Two<P>& c) {
    return {fused(a.low, b.low, c.low), fused(a.high, b.high, c.high)};
}
inline float fused(float a, float b, float c) {
#ifdef __FMA__
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// The sum of a vector: its halves are added, then theirs.
inline float total(Floats4 four) { return (four[0] + four[2]) + (four[1] + four[3]); }
#ifdef __AVX2__
inline float total(Floats8 eight) {
    return total(Floats4(_mm256_castps256_ps128((__m256)eight)) + Floats4(_mm256_extractf128_ps((__m256)eight, 1)));
}
#endif
#ifdef __AVX512F__
// Adds the same pairs.
inline float total(Lanes lanes) { return _mm512_reduce_add_ps((__m512)lanes); }
#endif
template <typename P> inline float total(const Two<P>& two) { return total(two.low + two.high); }

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
inline Lanes at(const Lanes&, const float* from) { return load(from); }
inline Lanes at(const Lanes&, const uint16_t* from) { return load(from); }
inline float at(float, const float* from) { return *from; }
inline float at(float, const uint16_t* from) { return from_bf16(*from); }

// The same number in all places.
inline Lanes of(const Lanes&, float value) { return all(value); }
inline float of(float, float value) { return value; }

inline Lanes put(float* to, const Lanes& lanes) { return store(to, lanes), lanes; }
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

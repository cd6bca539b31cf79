// The sparse parts of a training step on a CPU. Plain functions over raw memory, called through ctypes.
//
// Shapes: B tokens, D width, F features, K entries of a token's code, N = B K. Matrices are dense and row-major.

#include "search.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

template <typename T>
void scan(const T* scores, int64_t stride, int64_t tokens, const Block& block, const Margin* margins, int64_t k,
          int64_t room, Token* state, void* found) {
#pragma omp parallel
    {
        std::vector<float> lowers;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < tokens; ++b)
            if (state[b].count >= 0)
                scan_token(scores + b * stride, block, margins[b], k, room, state[b], found_at(found, b, room), lowers);
    }
}

} // namespace

// What the Python side expects; raised with every change of a signature.
KILOBASIS int64_t kilobasis_version() { return 7; }

// Ask for large pages where nothing was written yet: rows are read from all over, and each would be another small page.
KILOBASIS void kilobasis_ask_for_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 1 << 21;
    uintptr_t begin = ((uintptr_t)memory + PAGE - 1) / PAGE * PAGE, end = ((uintptr_t)memory + bytes) / PAGE * PAGE;
    if (end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

// Norms of rows.
KILOBASIS void kilobasis_norms(const void* rows, int64_t half, int64_t count, int64_t d, float* norm) {
    auto all_rows = [&](auto* typed) {
#pragma omp parallel for schedule(static)
        for (int64_t r = 0; r < count; ++r) {
            Lanes squares{};
            float rest = 0;
            int64_t i = 0;
            for (; i + WIDE <= d; i += WIDE) squares += load(typed + r * d + i) * load(typed + r * d + i);
            for (; i < d; ++i) rest += number(typed[r * d + i]) * number(typed[r * d + i]);
            norm[r] = norm_of(total(squares) + rest);
        }
    };
    half ? all_rows((const uint16_t*)rows) : all_rows((const float*)rows);
}

// Rows in bfloat16, their norms, and the norms of what rounding took away.
KILOBASIS void kilobasis_round(const float* rows, int64_t count, int64_t d, uint16_t* rounded, float* norm,
                               float* error) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < count; ++r) {
        const float* row = rows + r * d;
        uint16_t* out = rounded + r * d;
        float squares[WIDE] = {}, losses[WIDE] = {};
        int64_t i = 0;
        for (; i + WIDE <= d; i += WIDE)
            for (int64_t j = 0; j < WIDE; ++j) {
                out[i + j] = to_bf16(row[i + j]);
                float loss = row[i + j] - from_bf16(out[i + j]);
                squares[j] += row[i + j] * row[i + j];
                losses[j] += loss * loss;
            }
        for (; i < d; ++i) {
            out[i] = to_bf16(row[i]);
            float loss = row[i] - from_bf16(out[i]);
            squares[0] += row[i] * row[i];
            losses[0] += loss * loss;
        }
        norm[r] = norm_of(total(load(squares)));
        error[r] = loss_of(total(load(losses)), norm[r]);
    }
}

// See scan_token. `half` says that scores are bfloat16; `found` has room for 3 `room` numbers a token.
KILOBASIS void kilobasis_scan(const void* scores, int64_t half, int64_t stride, int64_t tokens, int64_t count,
                              int64_t first, const float* bias, const float* norm, const float* error,
                              const float* margins, int64_t k, int64_t room, void* state, void* found) {
    Block block{count, first, bias, norm, error};
    if (half)
        scan((const uint16_t*)scores, stride, tokens, block, (const Margin*)margins, k, room, (Token*)state, found);
    else
        scan((const float*)scores, stride, tokens, block, (const Margin*)margins, k, room, (Token*)state, found);
}

namespace {

template <typename W>
void decode(const float* z, const int64_t* indices, const W* weights, const float* bias, const float* target,
            float scale, int64_t tokens, int64_t d, int64_t k, float* error, float* grad_z, double* squares) {
#pragma omp parallel for schedule(dynamic, 16)
    for (int64_t b = 0; b < tokens; ++b) {
        float* row = error + b * d;
        if (bias) std::memcpy(row, bias, d * sizeof(float));
        else std::memset(row, 0, d * sizeof(float));
        for (int64_t i = 0; i < k; ++i) {
            float value = z[b * k + i];
            if (i + AHEAD < k) fetch(weights + indices[b * k + i + AHEAD] * d, d);
            if (value != 0) add_scaled(row, weights + indices[b * k + i] * d, value, d);
        }
        if (target)
            for (int64_t i = 0; i < d; ++i) row[i] -= target[b * d + i];
        if (squares) {
            double sum = 0;
            for (int64_t i = 0; i < d; ++i) sum += double(row[i]) * row[i];
            squares[b] = sum;
        }
        if (grad_z)
            for (int64_t i = 0; i < k; ++i)
                grad_z[b * k + i] = z[b * k + i] > 0 ? scale * dot(row, weights + indices[b * k + i] * d, d) : 0.0f;
    }
}

template <typename W>
void inner(const float* rows, const float* z, const int64_t* indices, const W* weights, int64_t tokens, int64_t d,
           int64_t k, float* products) {
#pragma omp parallel for schedule(dynamic, 16)
    for (int64_t b = 0; b < tokens; ++b)
        for (int64_t i = 0; i < k; ++i)
            products[b * k + i] = z[b * k + i] != 0 ? dot(rows + b * d, weights + indices[b * k + i] * d, d) : 0.0f;
}

} // namespace

// See select_token. Returns how many scores were computed. `half` says that weights are bfloat16, here and below.
KILOBASIS int64_t kilobasis_select(const float* x, const void* weights, int64_t half, const float* bias, int64_t tokens,
                                   int64_t d, int64_t features, int64_t k, int64_t room, void* state, void* found,
                                   float* z, int64_t* indices) {
    int64_t scored_in_all = 0;
    auto run = [&](auto* typed) {
#pragma omp parallel reduction(+ : scored_in_all)
        {
            std::vector<float> lowers;
            std::vector<Scored> scored;
#pragma omp for schedule(dynamic, 16)
            for (int64_t b = 0; b < tokens; ++b)
                scored_in_all += select_token(x + b * d, typed, bias, d, features, k, ((Token*)state)[b],
                                              found_at(found, b, room), true, z + b * k, indices + b * k, lowers, scored);
        }
    };
    half ? run((const uint16_t*)weights) : run((const float*)weights);
    return scored_in_all;
}

// error = bias + sum of z times decoder rows - target; grad_z = scale <error, decoder row> where z > 0; squares: the
// squared norm of each token's error. Without a target the error is the reconstruction; without grad_z none is made.
KILOBASIS void kilobasis_decode(const float* z, const int64_t* indices, const void* weights, int64_t half,
                                const float* bias, const float* target, float scale, int64_t tokens, int64_t d,
                                int64_t k, float* error, float* grad_z, double* squares) {
    auto run = [&](auto* typed) {
        decode(z, indices, typed, bias, target, scale, tokens, d, k, error, grad_z, squares);
    };
    half ? run((const uint16_t*)weights) : run((const float*)weights);
}

// The inner product of each token's row with the rows that its code names; 0 where z is.
KILOBASIS void kilobasis_inner(const float* rows, const float* z, const int64_t* indices, const void* weights,
                               int64_t half, int64_t tokens, int64_t d, int64_t k, float* products) {
    auto run = [&](auto* typed) { inner(rows, z, indices, typed, tokens, d, k, products); };
    half ? run((const uint16_t*)weights) : run((const float*)weights);
}

namespace {

// Eight numbers in float64, and in float32.
#ifdef __AVX512F__
typedef double Doubles __attribute__((vector_size(64)));
typedef Floats8 Eight;

inline Doubles doubles(Eight eight) { return __builtin_convertvector(eight, Doubles); }
inline Eight narrowed(Doubles wide) { return __builtin_convertvector(wide, Eight); }
#else
#ifdef __AVX2__
typedef double Doubles4 __attribute__((vector_size(32)));

inline Doubles4 doubles(Floats4 four) { return __builtin_convertvector(four, Doubles4); }
inline Floats4 narrowed(Doubles4 wide) { return __builtin_convertvector(wide, Floats4); }
#else
typedef double Doubles2 __attribute__((vector_size(16)));
typedef Two<Doubles2> Doubles4;

inline Doubles4 doubles(Floats4 four) { return {Doubles2{four[0], four[1]}, Doubles2{four[2], four[3]}}; }
// Through memory: of a vector of such conversions, widened again, GCC 12 leaves out the rounding.
inline Floats4 narrowed(const Doubles4& wide) {
    double from[4];
    float to[4];
    Memory<Doubles4>::store(from, wide);
    for (int i = 0; i < 4; ++i) to[i] = float(from[i]);
    return Memory<Floats4>::load(to);
}
#endif
typedef Two<Doubles4> Doubles;
typedef Two<Floats4> Eight;

inline Doubles doubles(const Eight& eight) { return {doubles(eight.low), doubles(eight.high)}; }
inline Eight narrowed(const Doubles& wide) { return {narrowed(wide.low), narrowed(wide.high)}; }
#endif
constexpr int64_t EIGHT = 8;

inline Doubles doubles(const float* at) { return doubles(Memory<Eight>::load(at)); }

// Sixteen, in two.
struct Pair {
    Doubles low, high;
};

inline Pair pair(const float* at) { return {doubles(at), doubles(at + EIGHT)}; }

inline Pair pair(const uint16_t* at) {
    Lanes lanes = load(at);
#if defined(__AVX512F__)
    __m512 wide = (__m512)lanes;
    return {(Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256(wide)),
            (Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps(wide, 1))};
#elif defined(__AVX2__)
    auto half = [](Floats8 eight) {
        return Doubles{(Doubles4)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)eight)),
                       (Doubles4)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)eight, 1))};
    };
    return {half(lanes.low), half(lanes.high)};
#else
    return {doubles(lanes.low), doubles(lanes.high)};
#endif
}

// Vectors of columns that are added up at once: their sums stay in registers.
#ifdef __AVX512F__
constexpr int64_t VECTORS = 8, COLUMNS = VECTORS * EIGHT;
#else
constexpr int64_t VECTORS = 4, COLUMNS = VECTORS * EIGHT;
#endif

// For each entry that is not zero, its value and the row that it names.
template <typename W, typename Each>
inline void each_row(const float* z, const int64_t* indices, const W* weights, int64_t d, int64_t k, bool ahead,
                     Each each) {
    for (int64_t i = 0; i < k; ++i) {
        if (ahead && i + AHEAD < k) fetch(weights + indices[i + AHEAD] * d, d);
        if (z[i] != 0) each(double(z[i]), weights + indices[i] * d);
    }
}

template <typename W>
void decode_double(const float* z, const int64_t* indices, const W* weights, const float* target, float scale,
                   int64_t tokens, int64_t d, int64_t k, double* sums, float* error, float* grad_z, double* squares) {
#pragma omp parallel for schedule(dynamic, 16)
    for (int64_t b = 0; b < tokens; ++b) {
        const float* own = z + b * k;
        const int64_t* named = indices + b * k;
        Doubles square_of_eight{};
        int64_t first = 0;
        for (; first + COLUMNS <= d; first += COLUMNS) {
            Doubles sum[VECTORS] = {};
            each_row(own, named, weights, d, k, !first, [&](double value, const W* row) {
                for (int64_t v = 0; v < VECTORS; v += 2) {
                    Pair numbers = pair(row + first + v * EIGHT);
                    sum[v] += value * numbers.low;
                    sum[v + 1] += value * numbers.high;
                }
            });
            if (!target) {
                for (int64_t v = 0; v < VECTORS; ++v) Memory<Doubles>::store(sums + b * d + first + v * EIGHT, sum[v]);
                continue;
            }
            for (int64_t v = 0; v < VECTORS; ++v) {
                int64_t at = b * d + first + v * EIGHT;
                Eight left = narrowed(sum[v] - doubles(target + at));
                Memory<Eight>::store(error + at, left);
                square_of_eight += doubles(left) * doubles(left);
            }
        }
        double square[EIGHT];
        Memory<Doubles>::store(square, square_of_eight);
        // What is left of a row.
        double sum[COLUMNS] = {};
        if (first < d)
            each_row(own, named, weights, d, k, !first, [&](double value, const W* row) {
                for (int64_t j = first; j < d; ++j) sum[j - first] += value * number(row[j]);
            });
        for (int64_t j = first; j < d; ++j) {
            if (!target) {
                sums[b * d + j] = sum[j - first];
                continue;
            }
            float left = float(sum[j - first] - target[b * d + j]);
            error[b * d + j] = left;
            square[j % EIGHT] += double(left) * left;
        }
        if (!target) continue;
        squares[b] = ((square[0] + square[1]) + (square[2] + square[3])) + ((square[4] + square[5]) + (square[6] + square[7]));
        for (int64_t i = 0; i < k; ++i) {
            bool moves = scale != 0 && z[b * k + i] > 0;
            grad_z[b * k + i] = moves ? scale * dot(error + b * d, weights + indices[b * k + i] * d, d) : 0.0f;
        }
    }
}

} // namespace

// As kilobasis_decode, with sums in float64: rounded to float32 they are the same however many ranks share the rows.
// Without a target they are left in `sums` as they are; otherwise target is taken off and the rest rounded to `error`.
KILOBASIS void kilobasis_decode_double(const float* z, const int64_t* indices, const void* weights, int64_t half,
                                       const float* target, float scale, int64_t tokens, int64_t d, int64_t k,
                                       double* sums, float* error, float* grad_z, double* squares) {
    auto run = [&](auto* typed) {
        decode_double(z, indices, typed, target, scale, tokens, d, k, sums, error, grad_z, squares);
    };
    half ? run((const uint16_t*)weights) : run((const float*)weights);
}

// A code turned over: the positions of its entries that are not zero, by feature and in batch order below that.
// starts has F + 1 entries. Returns how many entries there are.
KILOBASIS int64_t kilobasis_group(const float* z, const int64_t* indices, int64_t entries, int64_t features,
                                  int64_t* starts, int32_t* order) {
    std::memset(starts, 0, (features + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < entries; ++i)
        if (z[i] != 0) ++starts[indices[i] + 1];
    for (int64_t f = 0; f < features; ++f) starts[f + 1] += starts[f];
    for (int64_t i = 0; i < entries; ++i)
        if (z[i] != 0) order[starts[indices[i]]++] = int32_t(i);
    // Each start has moved to the next feature's.
    for (int64_t f = features; f > 0; --f) starts[f] = starts[f - 1];
    starts[0] = 0;
    return starts[features];
}

// For every feature the sum over its entries of value times the token's row. Shape (F, D), zero where nothing fired.
KILOBASIS void kilobasis_sums(const float* values, const float* rows, const int64_t* starts, const int32_t* order,
                              int64_t features, int64_t k, int64_t d, float* sums) {
#pragma omp parallel for schedule(dynamic, 64)
    for (int64_t f = 0; f < features; ++f) {
        float* sum = sums + f * d;
        std::memset(sum, 0, d * sizeof(float));
        for (int64_t i = starts[f]; i < starts[f + 1]; ++i) add_scaled(sum, rows + order[i] / k * d, values[order[i]], d);
    }
}

// The sparse parts of a training step on a CPU. Plain functions over raw memory, called through ctypes.
//
// Shapes: B tokens, D width, F features, K entries of a token's code, N = B K. Matrices are dense and row-major.
// Nothing here depends on the number of threads: each token, or each feature, is one thread's from beginning to end,
// and sums run in a fixed order. Products and sums of one row are made in 64 lanes whatever the machine has, so that
// machines with and without AVX-512 agree to the bit.

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
    Halves halves;
    std::memcpy(&halves, at, sizeof halves);
    Words words = __builtin_convertvector(halves, Words) << 16;
    Lanes lanes;
    std::memcpy(&lanes, &words, sizeof lanes);
    return lanes;
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
    float sums[WIDE];
    store(sums, lanes);
    for (int64_t half = WIDE / 2; half; half /= 2)
        for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
    return sums[0];
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

// What is known of one token's largest scores: features that may be among them, with bounds of their scores. `floor` is
// never above the k-th largest of all scores seen so far. A count below zero says that there was no room.
struct Token {
    int64_t count;
    float floor;
};

struct Found {
    int32_t* feature;
    float *lower, *upper;
};

inline Found found_at(void* memory, int64_t token, int64_t room) {
    float* at = (float*)memory + token * 3 * room;
    return {(int32_t*)at, at + room, at + 2 * room};
}

inline float kth_largest(std::vector<float>& values, int64_t k) {
    std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<float>());
    return values[k - 1];
}

// Raise the floor to the k-th largest lower bound, and forget what cannot reach it.
inline void prune(Token& token, const Found& found, int64_t k, std::vector<float>& lowers) {
    if (token.count > k) {
        lowers.assign(found.lower, found.lower + token.count);
        token.floor = std::max(token.floor, kth_largest(lowers, k));
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < token.count; ++i) {
        if (found.upper[i] < token.floor) continue;
        found.feature[kept] = found.feature[i];
        found.lower[kept] = found.lower[i];
        found.upper[kept++] = found.upper[i];
    }
    token.count = kept;
}

struct Margin {
    float per_norm, per_error, relative;
};

// Adding the bias rounds as well, here and where scores are exact; so does what a machine makes of the tiniest numbers.
constexpr float ROUNDING = 0x1p-22f, TINIEST = 1e-30f;

inline float margin_of(const Margin& m, float norm, float error, float score, float bias) {
    return m.per_norm * norm + m.per_error * error + m.relative * std::fabs(score) + ROUNDING * std::fabs(bias) +
           TINIEST;
}

struct Bounds {
    float lower, upper;
};

// A block of features, as the search knows them.
struct Block {
    int64_t count, first;
    const float *bias, *norm, *error;
};

template <typename T> inline Bounds bounds_of(const T* scores, int64_t f, const Block& block, const Margin& m) {
    float score = number(scores[f]), middle = score + block.bias[f];
    float margin = margin_of(m, block.norm[f], block.error[f], score, block.bias[f]);
    // What is no number may be anything.
    return {std::isnan(middle - margin) ? -INFINITY : middle - margin, middle + margin};
}

#ifdef __AVX512F__
inline __m512 scores_at(const uint16_t* at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at)), 16));
}
inline __m512 scores_at(const float* at) { return _mm512_loadu_ps(at); }

// bounds_of, for sixteen features at once.
struct WideBounds {
    __m512 per_norm, per_error, relative, rounding, tiniest;

    explicit WideBounds(const Margin& m)
        : per_norm(_mm512_set1_ps(m.per_norm)), per_error(_mm512_set1_ps(m.per_error)),
          relative(_mm512_set1_ps(m.relative)), rounding(_mm512_set1_ps(ROUNDING)), tiniest(_mm512_set1_ps(TINIEST)) {}

    template <typename T> void at(const T* scores, int64_t f, const Block& block, __m512& lower, __m512& upper) const {
        __m512 score = scores_at(scores + f), bias = _mm512_loadu_ps(block.bias + f);
        __m512 margin = _mm512_fmadd_ps(rounding, _mm512_abs_ps(bias), tiniest);
        margin = _mm512_fmadd_ps(relative, _mm512_abs_ps(score), margin);
        margin = _mm512_fmadd_ps(per_error, _mm512_loadu_ps(block.error + f), margin);
        margin = _mm512_fmadd_ps(per_norm, _mm512_loadu_ps(block.norm + f), margin);
        __m512 middle = _mm512_add_ps(score, bias);
        lower = _mm512_sub_ps(middle, margin);
        upper = _mm512_add_ps(middle, margin);
    }
};
#endif

// A first floor, from a block alone: it is cut into 2k parts or more, and the k-th largest of the parts' largest lower
// bounds is not above the k-th largest of all of them.
template <typename T>
float first_floor(const T* scores, const Block& block, const Margin& m, int64_t k, std::vector<float>& parts) {
    int64_t stride = (2 * k + WIDE - 1) / WIDE * WIDE;
    if (block.count < 2 * stride) return 0;
    parts.assign(stride, -INFINITY);
    int64_t f = 0;
#ifdef __AVX512F__
    WideBounds bounds(m);
    for (; f + stride <= block.count; f += stride)
        for (int64_t part = 0; part < stride; part += WIDE) {
            __m512 lower, upper;
            bounds.at(scores, f + part, block, lower, upper);
            // Of a number and what is none, max takes its second operand.
            _mm512_storeu_ps(&parts[part], _mm512_max_ps(lower, _mm512_loadu_ps(&parts[part])));
        }
#endif
    for (; f < block.count; ++f) parts[f % stride] = std::max(parts[f % stride], bounds_of(scores, f, block, m).lower);
    return std::max(0.0f, kth_largest(parts, k));
}

// Append a token's features of a block that may be among its k largest.
template <typename T>
void scan_token(const T* scores, const Block& block, const Margin& m, int64_t k, int64_t room, Token& token,
                const Found& found, std::vector<float>& lowers) {
    if (token.floor == 0) token.floor = first_floor(scores, block, m, k, lowers);
    auto fits = [&](int64_t more) {
        if (token.count + more > room) prune(token, found, k, lowers);
        if (token.count + more > room) token.count = -1;
        return token.count >= 0;
    };
    int64_t f = 0;
#ifdef __AVX512F__
    WideBounds bounds(m);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    for (; f + WIDE <= block.count; f += WIDE) {
        __m512 lower, upper;
        bounds.at(scores, f, block, lower, upper);
        // Not "not above" and not "below": what is no number passes, to be seen.
        __mmask16 may = _mm512_cmp_ps_mask(upper, _mm512_set1_ps(token.floor), _CMP_NLT_UQ) &
                        _mm512_cmp_ps_mask(upper, _mm512_setzero_ps(), _CMP_NLE_UQ);
        if (!may) continue;
        if (!fits(WIDE)) return;
        lower = _mm512_mask_mov_ps(lower, _mm512_cmp_ps_mask(lower, lower, _CMP_UNORD_Q), lowest);
        __m512i feature = _mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(block.first + f)));
        _mm512_mask_compressstoreu_epi32(found.feature + token.count, may, feature);
        _mm512_mask_compressstoreu_ps(found.lower + token.count, may, lower);
        _mm512_mask_compressstoreu_ps(found.upper + token.count, may, upper);
        token.count += __builtin_popcount(may);
    }
#endif
    for (; f < block.count; ++f) {
        Bounds bounds = bounds_of(scores, f, block, m);
        if (bounds.upper <= 0 || bounds.upper < token.floor) continue;
        if (!fits(1)) return;
        found.feature[token.count] = int32_t(block.first + f);
        found.lower[token.count] = bounds.lower;
        found.upper[token.count++] = bounds.upper;
    }
}

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

// Rows are gathered from all over memory: ask for one while others are worked on.
constexpr int64_t AHEAD = 2;

template <typename W> inline void fetch(const W* row, int64_t d) {
    for (int64_t i = 0; i < d; i += 64 / int64_t(sizeof(W))) __builtin_prefetch(row + i);
}

struct Scored {
    float value;
    int32_t feature;
};

// The larger value first; of equal ones the lower feature. What is no number comes first, and so is seen.
inline bool before(const Scored& a, const Scored& b) {
    bool a_nan = std::isnan(a.value), b_nan = std::isnan(b.value);
    if (a_nan != b_nan) return a_nan;
    if (!a_nan && a.value != b.value) return a.value > b.value;
    return a.feature < b.feature;
}

} // namespace

// What the Python side expects; raised with every change of a signature.
KILOBASIS int64_t kilobasis_version() { return 2; }

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
            norm[r] = std::sqrt(total(squares) + rest);
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
        norm[r] = std::sqrt(total(load(squares)));
        error[r] = std::sqrt(total(load(losses)));
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
int64_t select(const float* x, const W* weights, const float* bias, int64_t tokens, int64_t d, int64_t features,
               int64_t k, int64_t room, Token* state, void* found, float* z, int64_t* indices) {
    int64_t scored_in_all = 0;
#pragma omp parallel reduction(+ : scored_in_all)
    {
        std::vector<float> lowers;
        std::vector<Scored> scored;
#pragma omp for schedule(dynamic, 16)
        for (int64_t b = 0; b < tokens; ++b) {
            Token& token = state[b];
            Found candidates = found_at(found, b, room);
            if (token.count >= 0) prune(token, candidates, k, lowers);
            int64_t count = token.count >= 0 ? token.count : features;
            scored.clear();
            for (int64_t i = 0; i < count; ++i) {
                int64_t f = token.count >= 0 ? candidates.feature[i] : i;
                if (token.count >= 0 && i + AHEAD < count) fetch(weights + candidates.feature[i + AHEAD] * d, d);
                float value = dot(x + b * d, weights + f * d, d) + bias[f];
                if (!(value <= 0)) scored.push_back({value, int32_t(f)});
            }
            scored_in_all += count;
            int64_t kept = std::min<int64_t>(k, int64_t(scored.size()));
            std::partial_sort(scored.begin(), scored.begin() + kept, scored.end(), before);
            for (int64_t i = 0; i < kept; ++i) {
                z[b * k + i] = scored[i].value;
                indices[b * k + i] = scored[i].feature;
            }
            // The rest is filled with other features at zero, so that a code never names one twice.
            int64_t next = 0;
            for (int64_t i = kept; i < k; ++i, ++next) {
                while (std::find(indices + b * k, indices + b * k + kept, next) != indices + b * k + kept) ++next;
                z[b * k + i] = 0.0f;
                indices[b * k + i] = next;
            }
        }
    }
    return scored_in_all;
}

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

// Score the candidates exactly and keep the k largest that are above zero. A token whose candidates did not fit is
// scored against every feature. Returns how many scores were computed. `half` says that weights are bfloat16, here and
// below.
KILOBASIS int64_t kilobasis_select(const float* x, const void* weights, int64_t half, const float* bias, int64_t tokens,
                                   int64_t d, int64_t features, int64_t k, int64_t room, void* state, void* found,
                                   float* z, int64_t* indices) {
    auto run = [&](auto* typed) {
        return select(x, typed, bias, tokens, d, features, k, room, (Token*)state, found, z, indices);
    };
    return half ? run((const uint16_t*)weights) : run((const float*)weights);
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

// What a training step made, and how the rows that fired are to move.
struct KilobasisUpdate {
    // The step's code turned over (see kilobasis_group), K of its entries a token.
    const int64_t* starts;
    const int32_t* order;
    int64_t features, k, encoder_d, decoder_d;
    const float *z, *grad_z, *x; // (B, K), (B, K), (B, encoder_d)
    // Errors that entries explain, (B, decoder_d) each, and what turns an error into the gradient of the loss by its
    // reconstruction. `part` says which one is an entry's; without it all are of the first.
    const float* const* errors;
    const float* scales;
    const uint8_t* part;
    int64_t parts, half;
    void *encoder, *decoder; // (F, encoder_d), (F, decoder_d); bfloat16 where `half` is set
    float* bias;
    float *encoder_v, *decoder_v, *bias_v; // second moments: like their rows, or (F) where row_wise
    int32_t* stamps;                       // the step of each row's last update, from 1; 0 for never
    int64_t row_wise, step, first, seed;   // first: which of all features is the first one here
    double rate, beta2, epsilon, clip;
};

namespace {

inline int64_t part_of(const KilobasisUpdate& u, int64_t entry) { return u.part ? u.part[entry] : 0; }

// A thread's room for a feature's gradients, and for its rows while they move.
struct Scratch {
    std::vector<float> encoder, decoder, row;
    float bias = 0;

    explicit Scratch(const KilobasisUpdate& u)
        : encoder(u.encoder_d), decoder(u.decoder_d), row(std::max(u.encoder_d, u.decoder_d)) {}

    // The gradients of one feature's rows.
    void gather(const KilobasisUpdate& u, int64_t f) {
        std::fill(encoder.begin(), encoder.end(), 0.0f);
        std::fill(decoder.begin(), decoder.end(), 0.0f);
        bias = 0;
        for (int64_t i = u.starts[f]; i < u.starts[f + 1]; ++i) {
            int64_t entry = u.order[i], b = entry / u.k, part = part_of(u, entry);
            add_scaled(decoder.data(), u.errors[part] + b * u.decoder_d, u.z[entry] * u.scales[part], u.decoder_d);
            add_scaled(encoder.data(), u.x + b * u.encoder_d, u.grad_z[entry], u.encoder_d);
            bias += u.grad_z[entry];
        }
    }

    double square(const KilobasisUpdate& u) const {
        return double(dot(encoder.data(), encoder.data(), u.encoder_d)) +
               double(dot(decoder.data(), decoder.data(), u.decoder_d)) + double(bias) * bias;
    }
};

// Every feature that fired, with its gradients; squares: the squared norm of each feature's, before clipping.
template <typename Visit> void visit(const KilobasisUpdate& u, double* squares, Visit each) {
#pragma omp parallel
    {
        Scratch scratch(u);
#pragma omp for schedule(dynamic, 16)
        for (int64_t f = 0; f < u.features; ++f) {
            squares[f] = 0;
            if (u.starts[f] == u.starts[f + 1]) continue;
            scratch.gather(u, f);
            squares[f] = scratch.square(u);
            each(f, scratch);
        }
    }
}

// Adam without a first moment (beta1 = 0), on one row. Steps in which the row had no gradient only let the second
// moment decay, which is caught up here: the same as if every row were visited in every step.
inline void adam(float* w, float* v, const float* g, int64_t d, float decay, float correction,
                 const KilobasisUpdate& u) {
    float fresh = float((1 - u.beta2) * u.clip * u.clip), rate = float(u.rate * u.clip), epsilon = float(u.epsilon);
    if (u.row_wise) {
        *v = decay * *v + fresh * (dot(g, g, d) / float(d));
        rate /= std::sqrt(*v / correction) + epsilon;
        for (int64_t i = 0; i < d; ++i) w[i] -= rate * g[i];
        return;
    }
    for (int64_t i = 0; i < d; ++i) {
        v[i] = decay * v[i] + fresh * (g[i] * g[i]);
        w[i] -= rate * g[i] / (std::sqrt(v[i] / correction) + epsilon);
    }
}

inline void normalize(float* row, int64_t d) {
    float inverse = 1 / std::max(std::sqrt(dot(row, row, d)), 1e-12f);
    for (int64_t i = 0; i < d; ++i) row[i] *= inverse;
}

// Sixteen bits that depend on a number's place alone. See `portable.noise`.
inline uint32_t noise(uint32_t place) {
    place = (place ^ (place >> 16)) * 0x7feb352du;
    place = (place ^ (place >> 15)) * 0x846ca68bu;
    return (place ^ (place >> 16)) >> 16;
}

inline uint32_t place_of(const KilobasisUpdate& u, int64_t f, uint32_t salt) {
    return uint32_t(u.seed) * 0x27d4eb2fu + uint32_t(u.step) * 0xc2b2ae3du + uint32_t(u.first + f) * 0x9e3779b1u + salt;
}

// A row that moves in float32 and lies where it is: float32 as it is, bfloat16 rounded up or down at random, so that
// steps that are too small for it add up all the same.
template <typename Move> void moved(float* at, float*, int64_t, uint32_t, Move move) { move(at); }

template <typename Move> void moved(uint16_t* at, float* row, int64_t d, uint32_t place, Move move) {
    for (int64_t i = 0; i < d; ++i) row[i] = from_bf16(at[i]);
    move(row);
    for (int64_t i = 0; i < d; ++i) {
        uint32_t bits;
        std::memcpy(&bits, row + i, 4);
        bool finite = (bits & 0x7f800000u) != 0x7f800000u;
        at[i] = finite ? uint16_t((bits + noise(place + uint32_t(i) * 0x85ebca77u)) >> 16) : to_bf16(row[i]);
    }
}

template <typename W> void update_rows(const KilobasisUpdate& u, W* encoder, W* decoder, double* squares) {
    const float correction = float(1 - std::pow(u.beta2, double(u.step)));
    visit(u, squares, [&](int64_t f, Scratch& scratch) {
        float decay = float(std::pow(u.beta2, double(u.step - u.stamps[f])));
        float *encoder_v = u.encoder_v + (u.row_wise ? f : f * u.encoder_d),
              *decoder_v = u.decoder_v + (u.row_wise ? f : f * u.decoder_d);
        moved(encoder + f * u.encoder_d, scratch.row.data(), u.encoder_d, place_of(u, f, 1), [&](float* row) {
            adam(row, encoder_v, scratch.encoder.data(), u.encoder_d, decay, correction, u);
        });
        moved(decoder + f * u.decoder_d, scratch.row.data(), u.decoder_d, place_of(u, f, 2), [&](float* row) {
            float* gradient = scratch.decoder.data();
            add_scaled(gradient, row, -dot(gradient, row, u.decoder_d), u.decoder_d);
            adam(row, decoder_v, gradient, u.decoder_d, decay, correction, u);
            normalize(row, u.decoder_d);
        });
        adam(u.bias + f, u.bias_v + f, &scratch.bias, 1, decay, correction, u);
        u.stamps[f] = int32_t(u.step);
    });
}

} // namespace

// No less than the norm of the gradient of everything that fired, from the norms of tokens' rows alone: as if all that
// fired a feature pulled it one way. Cheap, and mostly enough to know that nothing is to be clipped.
KILOBASIS double kilobasis_norm_bound(const KilobasisUpdate* update, int64_t tokens) {
    const KilobasisUpdate& u = *update;
    std::vector<float> x(tokens), error(tokens * u.parts);
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < tokens; ++b) {
        x[b] = std::sqrt(dot(u.x + b * u.encoder_d, u.x + b * u.encoder_d, u.encoder_d) + 1);
        for (int64_t p = 0; p < u.parts; ++p) {
            const float* row = u.errors[p] + b * u.decoder_d;
            error[b * u.parts + p] = u.scales[p] * std::sqrt(dot(row, row, u.decoder_d));
        }
    }
    double sum = 0;
    for (int64_t f = 0; f < u.features; ++f) {
        double encoder = 0, decoder = 0;
        for (int64_t i = u.starts[f]; i < u.starts[f + 1]; ++i) {
            int64_t entry = u.order[i], b = entry / u.k;
            decoder += u.z[entry] * error[b * u.parts + part_of(u, entry)];
            encoder += std::fabs(u.grad_z[entry]) * x[b];
        }
        sum += encoder * encoder + decoder * decoder;
    }
    return 1.001 * std::sqrt(sum);
}

// The squared norm of each feature's gradient, before clipping.
KILOBASIS void kilobasis_squares(const KilobasisUpdate* update, double* squares) {
    visit(*update, squares, [](int64_t, Scratch&) {});
}

// Gradient, clipping, removal of what would only lengthen a decoder row, Adam and normalisation: one visit to each row
// that fired, and no gradient is ever stored. squares: as kilobasis_squares has them.
KILOBASIS void kilobasis_update(const KilobasisUpdate* update, double* squares) {
    const KilobasisUpdate& u = *update;
    if (u.half) update_rows(u, (uint16_t*)u.encoder, (uint16_t*)u.decoder, squares);
    else update_rows(u, (float*)u.encoder, (float*)u.decoder, squares);
}

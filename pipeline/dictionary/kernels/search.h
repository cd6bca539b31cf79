// The search for a token's largest scores: products that a machine makes fast find candidates, a bound on their error
// says which can be among the largest, and those are scored exactly.
//
// Shapes: B tokens, D width, F features, K entries of a token's code.
#pragma once

#include "lanes.h"

namespace {

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

// Norms, of which squares may have vanished: no less than they are. And of what rounding to bfloat16 takes away.
constexpr float LEAST_NORM = 1e-15f;

inline float norm_of(float squares) { return std::sqrt(squares) < LEAST_NORM ? LEAST_NORM : std::sqrt(squares); }

inline float loss_of(float squares, float norm) {
    // Below, squares of what is 2^-9 of a number may have vanished too.
    return norm < 0x1p10f * LEAST_NORM ? 0x1p-8f * norm : std::sqrt(squares);
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
inline __m512 widened(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline __m512 scores_at(const uint16_t* at) { return widened(_mm256_loadu_si256((const __m256i*)at)); }
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

// Score a token's candidates exactly, and keep the k largest that are above zero. One whose candidates did not fit is
// scored against every feature. Where fewer are above zero, the rest is 0: with `fill` it names other features, so that a
// code never names one twice, and otherwise feature 0. Returns how many scores were computed.
template <typename W>
int64_t select_token(const float* x, const W* weights, const float* bias, int64_t d, int64_t features, int64_t k,
                     Token& token, const Found& candidates, bool fill, float* z, int64_t* indices,
                     std::vector<float>& lowers, std::vector<Scored>& scored) {
    if (token.count >= 0) prune(token, candidates, k, lowers);
    bool few = token.count >= 0;
    int64_t count = few ? token.count : features;
    scored.clear();
    for (int64_t i = 0; few && i < std::min(AHEAD, count); ++i) fetch(weights + candidates.feature[i] * d, d);
    for (int64_t i = 0; i < count; ++i) {
        int64_t f = few ? candidates.feature[i] : i;
        if (few && i + AHEAD < count) fetch(weights + candidates.feature[i + AHEAD] * d, d);
        float value = dot(x, weights + f * d, d) + bias[f];
        if (!(value <= 0)) scored.push_back({value, int32_t(f)});
    }
    int64_t kept = std::min<int64_t>(k, int64_t(scored.size()));
    std::partial_sort(scored.begin(), scored.begin() + kept, scored.end(), before);
    for (int64_t i = 0; i < kept; ++i) {
        z[i] = scored[i].value;
        indices[i] = scored[i].feature;
    }
    int64_t next = 0;
    for (int64_t i = kept; i < k; ++i, ++next) {
        while (fill && std::find(indices, indices + kept, next) != indices + kept) ++next;
        z[i] = 0.0f;
        indices[i] = fill ? next : 0;
    }
    return count;
}

} // namespace

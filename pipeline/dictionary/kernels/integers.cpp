// The search for a token's largest scores in integers of sixteen bits. A machine with AVX2 and no more multiplies them
// twice as fast as float32, and it rounds rows to bfloat16's eight bits nowhere.
//
// A row becomes integers times a step of its own, so small that the norms of two such rows, multiplied, are below 2^31:
// then no sum of their products overflows (Cauchy and Schwarz), and every sum is exact. What is off is what rounding
// took away from the rows, and the search knows its norm.
//
// Shapes: B tokens, D width, F features, K entries of a token's code.

#include "search.h"

#if defined(__AVX2__) && defined(__FMA__)
namespace {

// Sums that registers hold at once: tokens, and features in vectors of eight.
constexpr int64_t TOKENS = 6, FEATURES = 16, VECTOR = 8;
// Features whose integers are in memory at once, in groups; token groups that share a group of features in the cache.
constexpr int64_t FEATURE_GROUPS = 64, TOKEN_GROUPS = 16;
// The largest norm of a row of integers: with what rounding may add, less than the root of 2^31.
constexpr float LARGEST_NORM = 46000, LARGEST = 32767;
// Below it, squares of what rounding takes away may vanish.
constexpr float SMALLEST_NORM = 1e-12f;

// Rows side by side: pairs of a row's integers, and beside each those of the group's other rows.
struct Group {
    int32_t* pairs;
    float *step, *norm, *error;
};

// A row's step and its reciprocal. Both are 0 where there are no integers for it: then it may be off by anything, unless
// all of it is zero.
struct Steps {
    float step = 0, reciprocal = 0;
    bool none;

    Steps(float norm, float most) : none(!(norm > SMALLEST_NORM) || !(norm < FLT_MAX)) {
        if (none) return;
        reciprocal = std::min(LARGEST_NORM / norm, LARGEST / most);
        step = 1 / reciprocal;
    }
};

template <typename W>
void round_row(const W* row, int64_t d, int64_t member, int64_t members, const Group& group, std::vector<float>& room) {
    // Ends with a pair, and where a vector does.
    room.assign((d + WIDE - 1) / WIDE * WIDE, 0.0f);
    float* numbers = room.data();
    along(d, [&](auto one, int64_t i) { put(numbers + i, at(one, row + i)); });
    float norm = std::sqrt(dot(numbers, numbers, d)), most = 0, each[VECTOR];
    __m256 largest = _mm256_setzero_ps();
    for (size_t i = 0; i < room.size(); i += VECTOR)
        largest = _mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(numbers + i)), largest);
    _mm256_storeu_ps(each, largest);
    for (float one : each) most = std::max(most, one);
    Steps steps(norm, most);
    const __m256 reciprocal = _mm256_set1_ps(steps.reciprocal), step = _mm256_set1_ps(steps.step);
    __m256 losses = _mm256_setzero_ps();
    int32_t* out = group.pairs + member;
    for (int64_t i = 0; i < d; i += WIDE) {
        __m256 first = _mm256_loadu_ps(numbers + i), second = _mm256_loadu_ps(numbers + i + VECTOR);
        __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(first, reciprocal));
        __m256i other = _mm256_cvtps_epi32(_mm256_mul_ps(second, reciprocal));
        first = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(whole), step, first);
        second = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(other), step, second);
        losses = _mm256_fmadd_ps(first, first, _mm256_fmadd_ps(second, second, losses));
        alignas(32) int32_t pairs[VECTOR];
        __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole, other), 0xd8);
        _mm256_store_si256((__m256i*)pairs, packed);
        for (int64_t pair = 0; pair < std::min(VECTOR, (d - i + 1) / 2); ++pair, out += members) *out = pairs[pair];
    }
    group.step[member] = steps.step;
    group.norm[member] = norm;
    bool zero = norm == 0 && most == 0;
    group.error[member] = zero ? 0.0f : steps.none ? INFINITY : std::sqrt(total((Floats8)losses));
}

// A group's rows; behind the last one there are zeros.
template <typename W>
void round_group(const W* rows, int64_t count, int64_t d, int64_t members, const Group& group, std::vector<float>& room) {
    if (count < members) {
        std::memset(group.pairs, 0, (d + 1) / 2 * members * sizeof(int32_t));
        std::fill_n(group.step, members, 0.0f);
        std::fill_n(group.norm, members, 0.0f);
        std::fill_n(group.error, members, 0.0f);
    }
    for (int64_t r = 0; r < count; ++r) round_row(rows + r * d, d, r, members, group, room);
}

// Products of a group of tokens with a group of features.
inline void multiply(const int32_t* tokens, const int32_t* features, int64_t pairs, __m256i sums[TOKENS][2]) {
    __m256i sum[TOKENS][2];
#pragma GCC unroll 6
    for (int t = 0; t < TOKENS; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
    for (int64_t p = 0; p < pairs; ++p, tokens += TOKENS, features += FEATURES) {
        __m256i first = _mm256_loadu_si256((const __m256i*)features);
        __m256i second = _mm256_loadu_si256((const __m256i*)(features + VECTOR));
#pragma GCC unroll 6
        for (int t = 0; t < TOKENS; ++t) {
            __m256i token = _mm256_set1_epi32(tokens[t]);
            sum[t][0] = _mm256_add_epi32(sum[t][0], _mm256_madd_epi16(token, first));
            sum[t][1] = _mm256_add_epi32(sum[t][1], _mm256_madd_epi16(token, second));
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < TOKENS; ++t) sums[t][0] = sum[t][0], sums[t][1] = sum[t][1];
}

// What is known of a group's features: how much one unit of a sum is, the bias, and what may be off.
struct Known {
    int64_t count, first;
    const float *step, *norm, *error, *bias, *least;
};

// Append a token's features of a group that may be among its k largest: see scan_token. `step` is the token's.
inline void scan_sums(const __m256i* sums, float step, const Known& known, const Margin& m, int64_t k, int64_t room,
                      Token& token, const Found& found, std::vector<float>& lowers) {
    if (token.count < 0) return;
    const __m256 sign = _mm256_set1_ps(-0.0f), floor = _mm256_set1_ps(token.floor);
    alignas(32) float middles[FEATURES], margins[FEATURES];
    unsigned may = 0;
    for (int64_t half = 0; half < 2; ++half) {
        int64_t f = half * VECTOR;
        __m256 unit = _mm256_mul_ps(_mm256_set1_ps(step), _mm256_loadu_ps(known.step + f));
        __m256 score = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[half]), unit);
        __m256 margin = _mm256_fmadd_ps(_mm256_set1_ps(m.relative), _mm256_andnot_ps(sign, score),
                                        _mm256_loadu_ps(known.least + f));
        margin = _mm256_fmadd_ps(_mm256_set1_ps(m.per_error), _mm256_loadu_ps(known.error + f), margin);
        margin = _mm256_fmadd_ps(_mm256_set1_ps(m.per_norm), _mm256_loadu_ps(known.norm + f), margin);
        __m256 middle = _mm256_add_ps(score, _mm256_loadu_ps(known.bias + f)), upper = _mm256_add_ps(middle, margin);
        // Not "not above" and not "below": what is no number passes, to be seen.
        __m256 passes = _mm256_and_ps(_mm256_cmp_ps(upper, floor, _CMP_NLT_UQ),
                                      _mm256_cmp_ps(upper, _mm256_setzero_ps(), _CMP_NLE_UQ));
        may |= unsigned(_mm256_movemask_ps(passes)) << f;
        _mm256_store_ps(middles + f, middle);
        _mm256_store_ps(margins + f, margin);
    }
    if (known.count < FEATURES) may &= (1u << known.count) - 1;
    if (!may) return;
    if (token.count + FEATURES > room) prune(token, found, k, lowers);
    if (token.count + FEATURES > room) {
        token.count = -1;
        return;
    }
    for (; may; may &= may - 1) {
        int f = __builtin_ctz(may);
        float lower = middles[f] - margins[f];
        found.feature[token.count] = int32_t(known.first + f);
        found.lower[token.count] = std::isnan(lower) ? -INFINITY : lower;
        found.upper[token.count++] = middles[f] + margins[f];
    }
}

inline int64_t groups_of(int64_t count, int64_t members) { return (count + members - 1) / members; }

} // namespace
#endif

// 0 where there are no such kernels, 1 where there are, and 2 where nothing that the machine has is faster.
KILOBASIS int64_t kilobasis_has_integers() {
#if defined(__AVX512F__)
    return 1;
#elif defined(__AVX2__) && defined(__FMA__)
    return 2;
#else
    return 0;
#endif
}

// Tokens (B, D) as groups of integers, with each one's step, norm, and norm of what rounding took away. Of `pairs` there
// are as many as six rows for every six tokens have; the others have room for as many tokens.
KILOBASIS void kilobasis_round_tokens(const float* x, int64_t tokens, int64_t d, int32_t* pairs, float* step,
                                      float* norm, float* error) {
#if defined(__AVX2__) && defined(__FMA__)
    int64_t size = (d + 1) / 2 * TOKENS;
#pragma omp parallel
    {
        std::vector<float> room;
#pragma omp for schedule(static)
        for (int64_t g = 0; g < groups_of(tokens, TOKENS); ++g) {
            int64_t first = g * TOKENS;
            Group group{pairs + g * size, step + first, norm + first, error + first};
            round_group(x + first * d, std::min(TOKENS, tokens - first), d, TOKENS, group, room);
        }
    }
#endif
}

// Candidates among all features, as kilobasis_scan finds them, for tokens as kilobasis_round_tokens has made them.
KILOBASIS void kilobasis_search_in_integers(const int32_t* pairs, const float* step, const void* weights, int64_t half,
                                            const float* bias, int64_t tokens, int64_t d, int64_t features,
                                            const float* margins, int64_t k, int64_t room, void* state, void* found) {
#if defined(__AVX2__) && defined(__FMA__)
    int64_t length = (d + 1) / 2, token_groups = groups_of(tokens, TOKENS), groups = groups_of(features, FEATURES);
    int64_t at_once = std::min(groups, FEATURE_GROUPS);
    std::vector<int32_t> integers(at_once * length * FEATURES);
    std::vector<float> facts(at_once * FEATURES * 5);
    Token* known_tokens = (Token*)state;
    auto fact = [&](int64_t which, int64_t slot) { return facts.data() + (which * at_once + slot) * FEATURES; };
    auto run = [&](auto* typed) {
#pragma omp parallel
        {
            std::vector<float> numbers, lowers;
            for (int64_t begin = 0; begin < groups; begin += at_once) {
                int64_t here = std::min(at_once, groups - begin);
#pragma omp for schedule(static)
                for (int64_t slot = 0; slot < here; ++slot) {
                    int64_t first = (begin + slot) * FEATURES, count = std::min(FEATURES, features - first);
                    Group group{integers.data() + slot * length * FEATURES, fact(0, slot), fact(1, slot), fact(2, slot)};
                    round_group(typed + first * d, count, d, FEATURES, group, numbers);
                    for (int64_t f = 0; f < FEATURES; ++f) {
                        float own = f < count ? bias[first + f] : 0.0f;
                        fact(3, slot)[f] = own;
                        fact(4, slot)[f] = ROUNDING * std::fabs(own) + TINIEST;
                    }
                }
#pragma omp for schedule(dynamic, 1)
                for (int64_t span = 0; span < groups_of(token_groups, TOKEN_GROUPS); ++span)
                    for (int64_t slot = 0; slot < here; ++slot) {
                        int64_t first = (begin + slot) * FEATURES;
                        Known known{std::min(FEATURES, features - first), first, fact(0, slot), fact(1, slot),
                                    fact(2, slot), fact(3, slot), fact(4, slot)};
                        int64_t end = std::min(token_groups, (span + 1) * TOKEN_GROUPS);
                        for (int64_t g = span * TOKEN_GROUPS; g < end; ++g) {
                            __m256i sums[TOKENS][2];
                            multiply(pairs + g * length * TOKENS, integers.data() + slot * length * FEATURES, length, sums);
                            for (int64_t t = 0, b = g * TOKENS; t < TOKENS && b < tokens; ++t, ++b)
                                scan_sums(sums[t], step[b], known, ((const Margin*)margins)[b], k, room,
                                          known_tokens[b], found_at(found, b, room), lowers);
                        }
                    }
            }
        }
    };
    half ? run((const uint16_t*)weights) : run((const float*)weights);
#endif
}

// The children of a tree's parents: scores of those alone that a token is routed to, and the largest of them.
//
// Shapes: B tokens, D width, F features in subtrees of `size` rows, P parents of a token, K entries of its code.

#include "tiles.h"

namespace {

// Inner products of T tokens with R rows, each made as `dot` makes it: a row that was read serves all tokens.
template <int T, int R, typename W>
inline void dots(const float* const* tokens, const W* rows, int64_t d, float* const* scores) {
    Lanes sums[T][R][4] = {};
    int64_t i = 0;
    for (; i + 4 * WIDE <= d; i += 4 * WIDE)
        for (int c = 0; c < 4; ++c) {
            Lanes x[T];
            for (int t = 0; t < T; ++t) x[t] = load(tokens[t] + i + c * WIDE);
            for (int r = 0; r < R; ++r) {
                Lanes row = load(rows + r * d + i + c * WIDE);
                for (int t = 0; t < T; ++t) sums[t][r][c] += x[t] * row;
            }
        }
    for (; i + WIDE <= d; i += WIDE)
        for (int t = 0; t < T; ++t)
            for (int r = 0; r < R; ++r) sums[t][r][0] += load(tokens[t] + i) * load(rows + r * d + i);
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) {
            float sum = total((sums[t][r][0] + sums[t][r][1]) + (sums[t][r][2] + sums[t][r][3]));
            for (int64_t j = i; j < d; ++j) sum += tokens[t][j] * number(rows[r * d + j]);
            scores[t][r] = sum;
        }
}

#ifdef __AVX512F__
// As many as registers hold.
constexpr int TILE_TOKENS = 2, TILE_ROWS = 3;
#else
constexpr int TILE_TOKENS = 1, TILE_ROWS = 1;
#endif

// Scores of all children of a parent for all tokens that it is routed to.
template <typename W>
void score_children(const float* x, const W* rows, int64_t children, int64_t d, int64_t parents, const int32_t* entries,
                    int64_t count, int64_t stride, float* scores) {
    auto token = [&](int64_t i) { return x + entries[i] / parents * d; };
    auto score = [&](int64_t i, int64_t row) { return scores + int64_t(entries[i]) * stride + row; };
    int64_t row = 0;
    for (; row + TILE_ROWS <= children; row += TILE_ROWS) {
        int64_t i = 0;
        for (; i + TILE_TOKENS <= count; i += TILE_TOKENS) {
            const float* some[TILE_TOKENS];
            float* made[TILE_TOKENS];
            for (int t = 0; t < TILE_TOKENS; ++t) some[t] = token(i + t), made[t] = score(i + t, row);
            dots<TILE_TOKENS, TILE_ROWS>(some, rows + row * d, d, made);
        }
        for (; i < count; ++i) {
            const float* one[] = {token(i)};
            float* made[] = {score(i, row)};
            dots<1, TILE_ROWS>(one, rows + row * d, d, made);
        }
    }
    for (; row < children; ++row)
        for (int64_t i = 0; i < count; ++i) *score(i, row) = dot(token(i), rows + row * d, d);
}

// The k largest of a token's scores that are above zero. `stride` scores for each of its parents, the last ones -inf.
inline int64_t largest_children(const float* scores, const int64_t* parents, int64_t count, int64_t stride,
                                int64_t size, int64_t k, float* z, int64_t* indices, std::vector<float>& parts,
                                std::vector<Scored>& kept) {
    // A floor, as in first_floor: no more than the k-th largest.
    int64_t wide = (2 * k + WIDE - 1) / WIDE * WIDE, all_scores = count * stride;
    float floor = 0;
    if (all_scores >= 2 * wide) {
        parts.assign(wide, -INFINITY);
        int64_t f = 0;
        for (; f + wide <= all_scores; f += wide)
            for (int64_t j = 0; j < wide; ++j) parts[j] = scores[f + j] > parts[j] ? scores[f + j] : parts[j];
        for (; f < all_scores; ++f) parts[f % wide] = std::max(parts[f % wide], scores[f]);
        floor = std::max(0.0f, kth_largest(parts, k));
    }
    kept.clear();
    for (int64_t p = 0; p < count; ++p) {
        if (parents[p] < 0) continue;
        for (int64_t j = 0; j < size - 1; ++j) {
            float value = scores[p * stride + j];
            if (!(value < floor) && !(value <= 0)) kept.push_back({value, int32_t(parents[p] * size + 1 + j)});
        }
    }
    int64_t most = std::min<int64_t>(k, int64_t(kept.size()));
    std::partial_sort(kept.begin(), kept.begin() + most, kept.end(), before);
    for (int64_t i = 0; i < k; ++i) {
        z[i] = i < most ? kept[i].value : 0.0f;
        indices[i] = i < most ? kept[i].feature : 0;
    }
    return most;
}

// Entries of `parents` by the subtree that they name, in their order below that.
inline void by_parent(const int64_t* parents, int64_t count, int64_t subtrees, int64_t* starts, int32_t* entries) {
    std::memset(starts, 0, (subtrees + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < count; ++i)
        if (parents[i] >= 0) ++starts[parents[i] + 1];
    for (int64_t s = 0; s < subtrees; ++s) starts[s + 1] += starts[s];
    for (int64_t i = 0; i < count; ++i)
        if (parents[i] >= 0) entries[starts[parents[i]]++] = int32_t(i);
    for (int64_t s = subtrees; s > 0; --s) starts[s] = starts[s - 1];
    starts[0] = 0;
}

} // namespace

// Whether this machine has tiles and lets this process use them. Asking for them is what makes it do so.
KILOBASIS int64_t kilobasis_has_tiles() {
#ifdef KILOBASIS_TILES
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & bit_AMX_TILE) || !(d & bit_AMX_BF16)) return 0;
    if (!__builtin_cpu_supports("avx512bf16")) return 0;
    constexpr long ASK = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
#else
    return 0;
#endif
}

// Among the children of each token's parents, the k with the largest scores above zero; the rest is 0 and names feature
// 0. A subtree is `size` rows: a parent and its children. `parents` (B, P) names subtrees, each once, or none with -1.
// `scores` has room for B P `stride` numbers, `starts` for one more than there are subtrees, `entries` for B P.
KILOBASIS void kilobasis_children(const float* x, const void* weights, int64_t half, const float* bias,
                                  const int64_t* parents, int64_t tokens, int64_t width, int64_t d, int64_t subtrees,
                                  int64_t size, int64_t k, int64_t stride, int64_t* starts, int32_t* entries,
                                  float* scores, float* z, int64_t* indices) {
    by_parent(parents, tokens * width, subtrees, starts, entries);
    auto run = [&](auto* typed) {
#pragma omp parallel for schedule(dynamic, 4)
        for (int64_t s = 0; s < subtrees; ++s) {
            int64_t count = starts[s + 1] - starts[s];
            const int32_t* own = entries + starts[s];
            if (count) score_children(x, typed + (s * size + 1) * d, size - 1, d, width, own, count, stride, scores);
            const float* own_bias = bias + s * size + 1;
            for (int64_t i = 0; i < count; ++i) {
                float* made = scores + own[i] * stride;
                for (int64_t j = 0; j < size - 1; ++j) made[j] += own_bias[j];
                for (int64_t j = size - 1; j < stride; ++j) made[j] = -INFINITY;
            }
        }
    };
    half ? run((const uint16_t*)weights) : run((const float*)weights);
#pragma omp parallel
    {
        std::vector<float> parts;
        std::vector<Scored> kept;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < tokens; ++b) {
            for (int64_t p = 0; p < width; ++p)
                if (parents[b * width + p] < 0) std::fill_n(scores + (b * width + p) * stride, stride, -INFINITY);
            largest_children(scores + b * width * stride, parents + b * width, width, stride, size, k, z + b * k,
                             indices + b * k, parts, kept);
        }
    }
}

// The same, where products of rows rounded to bfloat16 find candidates; see kilobasis_scan for what bounds their error.
// `rounded` are the tokens so rounded; `reaches` has room for three numbers a subtree.
KILOBASIS void kilobasis_children_in_tiles(const float* x, const uint16_t* rounded, const void* weights, int64_t half,
                                          const float* bias, const int64_t* parents, int64_t tokens, int64_t width,
                                          int64_t d, int64_t subtrees, int64_t size, int64_t k, int64_t stride,
                                          const float* margins, int64_t* starts, int32_t* entries, float* scores,
                                          float* reaches, float* z, int64_t* indices) {
#ifdef KILOBASIS_TILES
    by_parent(parents, tokens * width, subtrees, starts, entries);
    Reach* reach = (Reach*)reaches;
    auto run = [&](auto* typed) {
#pragma omp parallel
        {
            Packed packed(size - 1, d);
            Tiles tiles(size - 1);
#pragma omp for schedule(dynamic, 4)
            for (int64_t s = 0; s < subtrees; ++s) {
                int64_t count = starts[s + 1] - starts[s], first = s * size + 1;
                if (!count) continue;
                HalfRows own = halves_of(typed + first * d, size - 1, d, packed, reach[s]);
                reach[s].bias = largest_bias(bias + first, size - 1);
                score_in_tiles(rounded, own, bias + first, size - 1, d, width, entries + starts[s], count, stride,
                               packed, scores);
            }
        }
#pragma omp parallel
        {
            std::vector<float> parts, margin(width);
            std::vector<Scored> kept;
            const int64_t room = width * stride + WIDE;
            std::vector<float> memory(3 * room);
            Found found = found_at(memory.data(), 0, room);
#pragma omp for schedule(dynamic, 16)
            for (int64_t b = 0; b < tokens; ++b) {
                const int64_t* own = parents + b * width;
                const float* made = scores + b * width * stride;
                for (int64_t p = 0; p < width; ++p)
                    if (own[p] >= 0) margin[p] = margin_of(((const Margin*)margins)[b], reach[own[p]]);
                Token token{0, children_floor(made, own, margin.data(), width, stride, k, parts)};
                scan_children(made, own, margin.data(), width, stride, size, token, found);
                select_token(x + b * d, typed, bias, d, subtrees * size, k, token, found, false, z + b * k,
                             indices + b * k, parts, kept);
            }
        }
    };
    half ? run((const uint16_t*)weights) : run((const float*)weights);
#endif
}

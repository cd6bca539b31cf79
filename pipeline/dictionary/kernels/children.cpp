// The children of a tree's parents: scores of those alone that a token is routed to, and the largest of them.
//
// Shapes: B tokens, D width, F features in subtrees of `size` rows, P parents of a token, K entries of its code.

#include "search.h"

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// Matrix tiles (AMX) of bfloat16: a product of sixteen rows with sixteen tokens is one instruction for 32 of their numbers.
#if defined(__AVX512F__) && defined(__linux__) && defined(__x86_64__) && defined(__GNUC__)
#define KILOBASIS_TILES
#define WITH_TILES __attribute__((target("amx-tile,amx-bf16,avx512bf16")))

constexpr int64_t PAIRS = 2 * WIDE; // numbers of a tile's row

// Room for what products are made of: rows and tokens that end where a tile does.
struct Packed {
    int64_t blocks; // tiles that a row has
    std::vector<uint16_t> rows;
    std::vector<uint32_t> tokens;

    Packed(int64_t children, int64_t d)
        : blocks((d + PAIRS - 1) / PAIRS), rows(children * blocks * PAIRS), tokens(blocks * WIDE * WIDE) {}
};

struct HalfRows {
    const uint16_t* rows;
    int64_t stride;
};

// A parent's children in bfloat16, their norms, and the norms of what rounding took away.
WITH_TILES HalfRows halves_of(const float* rows, int64_t count, int64_t d, Packed& packed, float* norm, float* error) {
    int64_t stride = packed.blocks * PAIRS;
    for (int64_t r = 0; r < count; ++r) {
        const float* row = rows + r * d;
        uint16_t* out = packed.rows.data() + r * stride;
        __m512 squares = _mm512_setzero_ps(), losses = _mm512_setzero_ps();
        for (int64_t i = 0; i < d; i += WIDE) {
            __mmask16 there = d - i >= WIDE ? 0xffff : (1u << (d - i)) - 1;
            __m512 value = _mm512_maskz_loadu_ps(there, row + i);
            __m256i half = (__m256i)_mm512_cvtneps_pbh(value);
            __m512 lost = _mm512_sub_ps(value, widened(half));
            _mm256_storeu_si256((__m256i*)(out + i), half);
            squares = _mm512_fmadd_ps(value, value, squares);
            losses = _mm512_fmadd_ps(lost, lost, losses);
        }
        norm[r] = std::sqrt(_mm512_reduce_add_ps(squares));
        error[r] = std::sqrt(_mm512_reduce_add_ps(losses));
    }
    return {packed.rows.data(), stride};
}

// Rows that are bfloat16 lie as tiles want them, unless they end within one.
WITH_TILES HalfRows halves_of(const uint16_t* rows, int64_t count, int64_t d, Packed& packed, float* norm, float* error) {
    bool fits = d % PAIRS == 0;
    int64_t stride = packed.blocks * PAIRS;
    for (int64_t r = 0; r < count; ++r) {
        const uint16_t* row = rows + r * d;
        if (!fits) std::memcpy(packed.rows.data() + r * stride, row, d * sizeof *row);
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < d; i += PAIRS) {
            __mmask32 there = d - i >= PAIRS ? 0xffffffffu : (1u << (d - i)) - 1;
            __m512bh value = (__m512bh)_mm512_maskz_loadu_epi16(there, row + i);
            squares = _mm512_dpbf16_ps(squares, value, value);
        }
        norm[r] = std::sqrt(_mm512_reduce_add_ps(squares));
        error[r] = 0;
    }
    return fits ? HalfRows{rows, d} : HalfRows{packed.rows.data(), stride};
}

// Sixteen rows of sixteen words become columns.
WITH_TILES inline void turn_over(__m512i r[WIDE]) {
    __m512i t[WIDE];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// Compilers are not told that an instruction on tiles reads memory: everything must be there before.
inline void settle() { asm volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles of a thread, shaped for this product: what others had made of them is there again in the end.
class Tiles {
  public:
    // Sums 0 and rows 2 are full, sums 1 and rows 3 those of the last block; 4 are tokens.
    WITH_TILES explicit Tiles(int64_t children) {
        _tile_storeconfig(&before);
        settle();
        TileConfig shape;
        int64_t last = children % WIDE ? children % WIDE : WIDE;
        for (int tile : {0, 1, 2, 3, 4}) {
            shape.bytes[tile] = 64;
            shape.rows[tile] = uint8_t(tile == 1 || tile == 3 ? last : WIDE);
        }
        settle();
        _tile_loadconfig(&shape);
    }
    WITH_TILES ~Tiles() {
        if (before.palette) _tile_loadconfig(&before);
        else _tile_release();
    }
    Tiles(const Tiles&) = delete;

  private:
    TileConfig before;
};

// As score_children, of rounded rows, and in whatever order. `x` are tokens in bfloat16.
WITH_TILES void score_in_tiles(const uint16_t* x, HalfRows rows, int64_t children, int64_t d, int64_t parents,
                               const int32_t* entries, int64_t count, int64_t stride, Packed& packed, float* scores) {
    alignas(64) float sums[WIDE * WIDE] = {};
    uint32_t* columns = packed.tokens.data();
    for (int64_t i = 0; i < count; i += WIDE) {
        int64_t some = std::min(WIDE, count - i);
        __m512i turned[WIDE];
        for (int64_t block = 0; block < packed.blocks; ++block) {
            int64_t first = block * PAIRS;
            // What lies behind a token is another one's.
            __mmask32 there = d - first >= PAIRS ? 0xffffffffu : (1u << (d - first)) - 1;
            for (int64_t t = 0; t < WIDE; ++t) {
                const uint16_t* token = x + entries[i + std::min(t, some - 1)] / parents * d;
                turned[t] = _mm512_maskz_loadu_epi16(there, token + first);
            }
            turn_over(turned);
            for (int64_t pair = 0; pair < WIDE; ++pair)
                _mm512_storeu_si512(columns + (block * WIDE + pair) * WIDE, turned[pair]);
        }
        settle();
        for (int64_t row = 0; row < children; row += WIDE) {
            const uint16_t* own = rows.rows + row * rows.stride;
            if (row + WIDE <= children) {
                _tile_zero(0);
                for (int64_t block = 0; block < packed.blocks; ++block) {
                    _tile_loadd(2, own + block * PAIRS, rows.stride * 2);
                    _tile_loadd(4, columns + block * WIDE * WIDE, 64);
                    _tile_dpbf16ps(0, 2, 4);
                }
                _tile_stored(0, sums, 64);
            } else {
                _tile_zero(1);
                for (int64_t block = 0; block < packed.blocks; ++block) {
                    _tile_loadd(3, own + block * PAIRS, rows.stride * 2);
                    _tile_loadd(4, columns + block * WIDE * WIDE, 64);
                    _tile_dpbf16ps(1, 3, 4);
                }
                _tile_stored(1, sums, 64);
            }
            // Columns are tokens. Behind the last child there is room for as many as a vector has.
            for (int64_t r = 0; r < WIDE; ++r) turned[r] = _mm512_loadu_si512(sums + r * WIDE);
            turn_over(turned);
            for (int64_t t = 0; t < some; ++t)
                _mm512_storeu_si512(scores + int64_t(entries[i + t]) * stride + row, turned[t]);
        }
    }
}

// A floor for a token, as in first_floor, over the children of all its parents.
inline float children_floor(const float* scores, const int64_t* parents, int64_t width, int64_t stride, int64_t size,
                            int64_t k, const float* bias, const float* norm, const float* error, const Margin& m,
                            std::vector<float>& parts) {
    int64_t wide = (2 * k + WIDE - 1) / WIDE * WIDE, at = 0;
    parts.assign(wide, -INFINITY);
    WideBounds bounds(m);
    int64_t seen = 0;
    // Any part of all scores gives a floor. That of the first parents, which fired most strongly, is nearly as high.
    for (int64_t p = 0; p < width && seen < 16 * wide; ++p) {
        if (parents[p] < 0) continue;
        int64_t first = parents[p] * size + 1;
        Block block{size - 1, first, bias + first, norm + first, error + first};
        for (int64_t j = 0; j + WIDE <= block.count; j += WIDE) {
            __m512 lower, upper;
            bounds.at(scores + p * stride, j, block, lower, upper);
            // Of a number and what is none, max takes its second operand.
            _mm512_storeu_ps(&parts[at], _mm512_max_ps(lower, _mm512_loadu_ps(&parts[at])));
            at = at + WIDE == wide ? 0 : at + WIDE;
            seen += WIDE;
        }
    }
    return seen < 2 * wide ? 0 : std::max(0.0f, kth_largest(parts, k));
}
#endif

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
// `rounded` are the tokens so rounded; `norm` and `error` (F) are room for what is found out about rows; `state` and
// `found` have room for all children of a token's parents.
KILOBASIS void kilobasis_children_in_tiles(const float* x, const uint16_t* rounded, const void* weights, int64_t half,
                                          const float* bias, const int64_t* parents, int64_t tokens, int64_t width,
                                          int64_t d, int64_t subtrees, int64_t size, int64_t k, int64_t stride,
                                          const float* margins, int64_t room, int64_t* starts, int32_t* entries,
                                          float* scores, float* norm, float* error, void* state, void* found, float* z,
                                          int64_t* indices) {
#ifdef KILOBASIS_TILES
    by_parent(parents, tokens * width, subtrees, starts, entries);
    auto run = [&](auto* typed) {
#pragma omp parallel
        {
            Packed packed(size - 1, d);
            Tiles tiles(size - 1);
#pragma omp for schedule(dynamic, 4)
            for (int64_t s = 0; s < subtrees; ++s) {
                int64_t count = starts[s + 1] - starts[s], first = s * size + 1;
                if (!count) continue;
                HalfRows own = halves_of(typed + first * d, size - 1, d, packed, norm + first, error + first);
                score_in_tiles(rounded, own, size - 1, d, width, entries + starts[s], count, stride, packed, scores);
            }
        }
#pragma omp parallel
        {
            std::vector<float> parts;
#pragma omp for schedule(static)
            for (int64_t b = 0; b < tokens; ++b) {
                Token& token = ((Token*)state)[b] = {0, 0.0f};
                const Margin& margin = ((const Margin*)margins)[b];
                const int64_t* own = parents + b * width;
                token.floor = children_floor(scores + b * width * stride, own, width, stride, size, k, bias, norm,
                                             error, margin, parts);
                for (int64_t p = 0; p < width; ++p) {
                    if (own[p] < 0) continue;
                    int64_t first = own[p] * size + 1;
                    Block block{size - 1, first, bias + first, norm + first, error + first};
                    scan_token(scores + (b * width + p) * stride, block, margin, k, room, token,
                               found_at(found, b, room), parts);
                }
            }
        }
        select(x, typed, bias, tokens, d, subtrees * size, k, room, (Token*)state, found, false, z, indices);
    };
    half ? run((const uint16_t*)weights) : run((const float*)weights);
#endif
}

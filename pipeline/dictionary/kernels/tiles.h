// Products of a parent's children with the tokens that it is routed to, by matrix tiles (AMX), and what they may be off.
//
// Shapes: B tokens, D width, P parents of a token, K entries of its code.
#pragma once

#include "search.h"

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

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

// The most of all children of a parent: norm, norm of what rounding took away, and size of the bias.
struct Reach {
    float norm, error, bias;
};

inline float largest_bias(const float* bias, int64_t count) {
    float most = 0;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, std::fabs(bias[i]));
    return most;
}

// margin_of, of whichever child. A score is no larger than norms allow.
inline float margin_of(const Margin& m, const Reach& reach) {
    return margin_of(m, reach.norm, reach.error, m.per_error * reach.norm, reach.bias);
}

// The larger one; what is no number is larger than any.
inline float most(float a, float b) { return b > a || std::isnan(b) ? b : a; }

// Rows that are read one behind the other are asked for so many ahead.
constexpr int64_t ROWS_AHEAD = 8;

// A parent's children in bfloat16.
WITH_TILES HalfRows halves_of(const float* rows, int64_t count, int64_t d, Packed& packed, Reach& reach) {
    float norm = 0, error = 0;
    int64_t stride = packed.blocks * PAIRS;
    for (int64_t r = 0; r < count; ++r) {
        const float* row = rows + r * d;
        fetch(row + ROWS_AHEAD * d, d);
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
        norm = most(norm, _mm512_reduce_add_ps(squares));
        error = most(error, _mm512_reduce_add_ps(losses));
    }
    reach.norm = norm_of(norm), reach.error = loss_of(error, reach.norm);
    return {packed.rows.data(), stride};
}

// Rows that are bfloat16 lie as tiles want them, unless they end within one.
WITH_TILES HalfRows halves_of(const uint16_t* rows, int64_t count, int64_t d, Packed& packed, Reach& reach) {
    float norm = 0;
    bool fits = d % PAIRS == 0;
    int64_t stride = packed.blocks * PAIRS;
    for (int64_t r = 0; r < count; ++r) {
        const uint16_t* row = rows + r * d;
        fetch(row + ROWS_AHEAD * d, d);
        if (!fits) std::memcpy(packed.rows.data() + r * stride, row, d * sizeof *row);
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < d; i += PAIRS) {
            __mmask32 there = d - i >= PAIRS ? 0xffffffffu : (1u << (d - i)) - 1;
            __m512bh value = (__m512bh)_mm512_maskz_loadu_epi16(there, row + i);
            squares = _mm512_dpbf16_ps(squares, value, value);
        }
        norm = most(norm, _mm512_reduce_add_ps(squares));
    }
    reach.norm = norm_of(norm), reach.error = 0;
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
    // Sums 0 to 2 and rows 4 are full, sums 3 and rows 5 those of the last block; 6 are tokens.
    WITH_TILES explicit Tiles(int64_t children) {
        _tile_storeconfig(&before);
        settle();
        TileConfig shape;
        int64_t last = (children - 1) % WIDE + 1;
        for (int tile = 0; tile < 7; ++tile) {
            shape.bytes[tile] = 64;
            shape.rows[tile] = uint8_t(tile == 3 || tile == 5 ? last : WIDE);
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

// Products of sixteen tokens with FULL times sixteen rows, and with the last ones where there are such: as many sums at
// once as tiles can hold, because one waits long for the next. They end up one behind the other in `sums`.
template <int FULL, bool LAST>
WITH_TILES inline void multiply(const uint16_t* rows, int64_t stride, const uint32_t* columns, int64_t blocks,
                                float* sums) {
    if (FULL > 0) _tile_zero(0);
    if (FULL > 1) _tile_zero(1);
    if (FULL > 2) _tile_zero(2);
    if (LAST) _tile_zero(3);
    for (int64_t block = 0; block < blocks; ++block) {
        const uint16_t* own = rows + block * PAIRS;
        _tile_loadd(6, columns + block * WIDE * WIDE, 64);
        if (FULL > 0) {
            _tile_loadd(4, own, stride * 2);
            _tile_dpbf16ps(0, 4, 6);
        }
        if (FULL > 1) {
            _tile_loadd(4, own + WIDE * stride, stride * 2);
            _tile_dpbf16ps(1, 4, 6);
        }
        if (FULL > 2) {
            _tile_loadd(4, own + 2 * WIDE * stride, stride * 2);
            _tile_dpbf16ps(2, 4, 6);
        }
        if (LAST) {
            _tile_loadd(5, own + FULL * WIDE * stride, stride * 2);
            _tile_dpbf16ps(3, 5, 6);
        }
    }
    if (FULL > 0) _tile_stored(0, sums, 64);
    if (FULL > 1) _tile_stored(1, sums + WIDE * WIDE, 64);
    if (FULL > 2) _tile_stored(2, sums + 2 * WIDE * WIDE, 64);
    if (LAST) _tile_stored(3, sums + FULL * WIDE * WIDE, 64);
    settle();
}

// Sixteen tokens, or fewer, as tiles want them: pairs of numbers, token beside token. What lies behind the last is one of
// them again.
WITH_TILES inline void pack_tokens(const uint16_t* x, int64_t d, int64_t parents, const int32_t* entries, int64_t some,
                                   Packed& packed) {
    __m512i turned[WIDE];
    for (int64_t block = 0; block < packed.blocks; ++block) {
        int64_t first = block * PAIRS;
        // What lies behind a token is another one's.
        __mmask32 there = d - first >= PAIRS ? 0xffffffffu : (1u << (d - first)) - 1;
        for (int64_t t = 0; t < WIDE; ++t)
            turned[t] = _mm512_maskz_loadu_epi16(there, x + entries[std::min(t, some - 1)] / parents * d + first);
        turn_over(turned);
        for (int64_t pair = 0; pair < WIDE; ++pair)
            _mm512_storeu_si512(packed.tokens.data() + (block * WIDE + pair) * WIDE, turned[pair]);
    }
    settle();
}

// As score_children, of rounded rows, in whatever order, and with the bias. `x` are tokens in bfloat16. Behind the last
// child there is room for as many as a vector has: those are -inf.
WITH_TILES void score_in_tiles(const uint16_t* x, HalfRows rows, const float* bias, int64_t children, int64_t d,
                               int64_t parents, const int32_t* entries, int64_t count, int64_t stride, Packed& packed,
                               float* scores) {
    alignas(64) float sums[4 * WIDE * WIDE];
    const uint32_t* columns = packed.tokens.data();
    __m512i turned[WIDE];
    for (int64_t i = 0; i < count; i += WIDE) {
        int64_t some = std::min(WIDE, count - i);
        pack_tokens(x, d, parents, entries + i, some, packed);
        for (int64_t row = 0; row < children;) {
            const uint16_t* own = rows.rows + row * rows.stride;
            int64_t full = std::min<int64_t>(3, (children - 1 - row) / WIDE);
            bool last = row + (full + 1) * WIDE >= children;
            auto made = [&](auto with_last, auto without) {
                last ? with_last(own, rows.stride, columns, packed.blocks, sums)
                     : without(own, rows.stride, columns, packed.blocks, sums);
            };
            switch (full) {
            case 0: multiply<0, true>(own, rows.stride, columns, packed.blocks, sums); break;
            case 1: made(multiply<1, true>, multiply<1, false>); break;
            case 2: made(multiply<2, true>, multiply<2, false>); break;
            default: made(multiply<3, true>, multiply<3, false>);
            }
            for (int64_t block = 0; block < full + last; ++block, row += WIDE) {
                for (int64_t r = 0; r < WIDE; ++r)
                    turned[r] = (__m512i)(row + r < children
                                              ? _mm512_add_ps(_mm512_load_ps(sums + (block * WIDE + r) * WIDE),
                                                              _mm512_set1_ps(bias[row + r]))
                                              : _mm512_set1_ps(-INFINITY));
                turn_over(turned);
                for (int64_t t = 0; t < some; ++t)
                    _mm512_storeu_si512(scores + int64_t(entries[i + t]) * stride + row, turned[t]);
            }
        }
    }
}

// A floor for a token, as in first_floor, from children of its parents. Any part of all scores gives one; that of the
// first parents, which fired most strongly, is nearly as high. `margin` says how far scores of a parent's may be off.
inline float children_floor(const float* scores, const int64_t* parents, const float* margin, int64_t width,
                            int64_t stride, int64_t k, std::vector<float>& parts) {
    int64_t wide = (2 * k + WIDE - 1) / WIDE * WIDE, at = 0, seen = 0;
    parts.assign(wide, -INFINITY);
    for (int64_t p = 0; p < width && seen < 16 * wide; ++p) {
        if (parents[p] < 0) continue;
        __m512 off = _mm512_set1_ps(margin[p]);
        for (int64_t j = 0; j < stride; j += WIDE) {
            __m512 lower = _mm512_sub_ps(_mm512_loadu_ps(scores + p * stride + j), off);
            // Of a number and what is none, max takes its second operand.
            _mm512_storeu_ps(&parts[at], _mm512_max_ps(lower, _mm512_loadu_ps(&parts[at])));
            at = at + WIDE == wide ? 0 : at + WIDE;
            seen += WIDE;
        }
    }
    return std::max(0.0f, kth_largest(parts, k));
}

// Children that may be among a token's largest. There is room for all of them.
inline void scan_children(const float* scores, const int64_t* parents, const float* margin, int64_t width,
                          int64_t stride, int64_t size, Token& token, const Found& found) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    for (int64_t p = 0; p < width; ++p) {
        if (parents[p] < 0) continue;
        __m512 off = _mm512_set1_ps(margin[p]), least = _mm512_sub_ps(_mm512_set1_ps(token.floor), off);
        for (int64_t j = 0; j < size - 1; j += WIDE) {
            __mmask16 there = size - 1 - j >= WIDE ? 0xffff : (1u << (size - 1 - j)) - 1;
            __m512 score = _mm512_loadu_ps(scores + p * stride + j);
            // Not "not below": what is no number passes, to be seen.
            __mmask16 may = _mm512_mask_cmp_ps_mask(there, score, least, _CMP_NLT_UQ);
            if (!may) continue;
            __m512 lower = _mm512_sub_ps(score, off), upper = _mm512_add_ps(score, off);
            lower = _mm512_mask_mov_ps(lower, _mm512_cmp_ps_mask(lower, lower, _CMP_UNORD_Q), lowest);
            __m512i feature = _mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(parents[p] * size + 1 + j)));
            _mm512_mask_compressstoreu_epi32(found.feature + token.count, may, feature);
            _mm512_mask_compressstoreu_ps(found.lower + token.count, may, lower);
            _mm512_mask_compressstoreu_ps(found.upper + token.count, may, upper);
            token.count += __builtin_popcount(may);
        }
    }
}
#endif

} // namespace

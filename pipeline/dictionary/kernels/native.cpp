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
KILOBASIS int64_t kilobasis_version() { return 4; }

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
        return select(x, typed, bias, tokens, d, features, k, room, (Token*)state, found, true, z, indices);
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

// As kilobasis_decode, with sums in float64: rounded to float32 they are the same however many ranks share the rows.
// Without a target they are left in `sums` as they are; otherwise target is taken off and the rest rounded to `error`.
KILOBASIS void kilobasis_decode_double(const float* z, const int64_t* indices, const void* weights, int64_t half,
                                       const float* target, float scale, int64_t tokens, int64_t d, int64_t k,
                                       double* sums, float* error, float* grad_z, double* squares) {
    auto run = [&](auto* typed) {
#pragma omp parallel
        {
            std::vector<double> room(target ? d : 0);
#pragma omp for schedule(dynamic, 16)
            for (int64_t b = 0; b < tokens; ++b) {
                double* sum = target ? room.data() : sums + b * d;
                std::memset(sum, 0, d * sizeof(double));
                for (int64_t i = 0; i < k; ++i) {
                    double value = z[b * k + i];
                    if (i + AHEAD < k) fetch(typed + indices[b * k + i + AHEAD] * d, d);
                    if (value == 0) continue;
                    const auto* row = typed + indices[b * k + i] * d;
                    for (int64_t j = 0; j < d; ++j) sum[j] += value * number(row[j]);
                }
                if (!target) continue;
                float* left = error + b * d;
                double square = 0;
                for (int64_t j = 0; j < d; ++j) left[j] = float(sum[j] - target[b * d + j]);
                for (int64_t j = 0; j < d; ++j) square += double(left[j]) * left[j];
                squares[b] = square;
                for (int64_t i = 0; i < k; ++i)
                    grad_z[b * k + i] =
                        z[b * k + i] > 0 ? scale * dot(left, typed + indices[b * k + i] * d, d) : 0.0f;
            }
        }
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

// What a training step made, and how the rows that fired are to move.
struct KilobasisUpdate {
    // The step's code turned over (see kilobasis_group), K of its entries a token.
    const int64_t* starts;
    const int32_t* order;
    int64_t features, k, encoder_d, decoder_d;
    const float *z, *grad_z; // (B, K)
    // What entries encoded, (B, encoder_d) each; errors that they explain, (B, decoder_d) each, and what turns an error
    // into the gradient of the loss by its reconstruction. `part` says which ones are an entry's; without it all are of
    // the first.
    const float* const* inputs;
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
            add_scaled(encoder.data(), u.inputs[part] + b * u.encoder_d, u.grad_z[entry], u.encoder_d);
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
    std::vector<float> input(tokens * u.parts), error(tokens * u.parts);
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < tokens; ++b)
        for (int64_t p = 0; p < u.parts; ++p) {
            const float *row = u.errors[p] + b * u.decoder_d, *x = u.inputs[p] + b * u.encoder_d;
            error[b * u.parts + p] = u.scales[p] * std::sqrt(dot(row, row, u.decoder_d));
            bool known = p && u.inputs[p] == u.inputs[p - 1];
            input[b * u.parts + p] = known ? input[b * u.parts + p - 1] : std::sqrt(dot(x, x, u.encoder_d) + 1);
        }
    double sum = 0;
    for (int64_t f = 0; f < u.features; ++f) {
        double encoder = 0, decoder = 0;
        for (int64_t i = u.starts[f]; i < u.starts[f + 1]; ++i) {
            int64_t entry = u.order[i], at = entry / u.k * u.parts + part_of(u, entry);
            decoder += u.z[entry] * error[at];
            encoder += std::fabs(u.grad_z[entry]) * input[at];
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

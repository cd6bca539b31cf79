// What a training step does to a dictionary's rows: gradient, Adam and rounding in one visit to each row that fired.
//
// Shapes: B tokens, D width, F features, K entries of a token's code.

#include "lanes.h"

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
    void *encoder_m, *decoder_m;           // first moments, like their rows; null where there are none
    float* bias_m;
    int64_t row_wise, step, first, seed;   // first: which of all features is the first one here
    double rate, beta1, beta2, epsilon, clip;
};

namespace {

inline int64_t part_of(const KilobasisUpdate& u, int64_t entry) { return u.part ? u.part[entry] : 0; }

// A thread's room for a feature's gradients, and for its rows while they move.
struct Scratch {
    std::vector<float> encoder, decoder, row;
    float bias = 0;
    double encoder_square = 0, decoder_square = 0;

    explicit Scratch(const KilobasisUpdate& u)
        : encoder(u.encoder_d), decoder(u.decoder_d), row(std::max(u.encoder_d, u.decoder_d)) {}

    // The gradients of one feature's rows.
    void gather(const KilobasisUpdate& u, int64_t f) {
        bias = 0;
        for (int64_t i = u.starts[f]; i < u.starts[f + 1]; ++i) {
            int64_t entry = u.order[i], b = entry / u.k, part = part_of(u, entry);
            bool first = i == u.starts[f];
            add(first, decoder.data(), u.errors[part] + b * u.decoder_d, u.z[entry] * u.scales[part], u.decoder_d);
            add(first, encoder.data(), u.inputs[part] + b * u.encoder_d, u.grad_z[entry], u.encoder_d);
            bias += u.grad_z[entry];
        }
        encoder_square = dot(encoder.data(), encoder.data(), u.encoder_d);
        decoder_square = dot(decoder.data(), decoder.data(), u.decoder_d);
    }

    double square() const { return encoder_square + decoder_square + double(bias) * bias; }

  private:
    static void add(bool first, float* to, const float* from, float scale, int64_t d) {
        if (!first) return add_scaled(to, from, scale, d);
        along(d, [&](auto one, int64_t i) { put(to + i, scale * at(one, from + i)); });
    }
};

// Every feature that fired, with its gradients; squares: the squared norm of each feature's, before clipping.
template <typename Visit> void visit(const KilobasisUpdate& u, double* squares, Visit each) {
#pragma omp parallel
    {
        Scratch scratch(u);
#pragma omp for schedule(dynamic, 64)
        for (int64_t f = 0; f < u.features; ++f) {
            squares[f] = 0;
            if (u.starts[f] == u.starts[f + 1]) continue;
            scratch.gather(u, f);
            squares[f] = scratch.square();
            each(f, scratch);
        }
    }
}

// Sixteen bits that depend on a number's place alone, for sixteen places. See `portable.noise`.
inline Words noise(Words place) {
    place = (place ^ (place >> 16)) * 0x7feb352du;
    place = (place ^ (place >> 15)) * 0x846ca68bu;
    return (place ^ (place >> 16)) >> 16;
}

// Sixteen numbers in bfloat16.
typedef uint16_t Halves __attribute__((vector_size(32)));

#ifndef __AVX512F__
// The upper halves of float32 numbers, one in each word.
template <typename V> inline V rounded_words(V bits, V noise_) {
    V is_nan = (V)((bits & 0x7fffffffu) > 0x7f800000u), is_finite = (V)((bits & 0x7f800000u) != 0x7f800000u);
    V up = (bits + noise_) >> 16, same = (bits >> 16) | (is_nan & 64u);
    return (up & is_finite) | (same & ~is_finite);
}
template <typename P> inline Two<P> rounded_words(const Two<P>& bits, const Two<P>& noise_) {
    return {rounded_words(bits.low, noise_.low), rounded_words(bits.high, noise_.high)};
}
#endif

// Float32 to bfloat16, up or down by `noise_`; what is not finite stays what it is.
inline Halves rounded(const Lanes& lanes, const Words& noise_) {
#if defined(__AVX512F__)
    __m512i bits = (__m512i)lanes, size = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    const __m512i infinite = _mm512_set1_epi32(0x7f800000);
    __mmask16 is_finite = _mm512_cmplt_epu32_mask(size, infinite), is_nan = _mm512_cmpgt_epu32_mask(size, infinite);
    bits = _mm512_mask_add_epi32(bits, is_finite, bits, (__m512i)noise_);
    bits = _mm512_mask_or_epi32(bits, is_nan, bits, _mm512_set1_epi32(64 << 16));
    return (Halves)_mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
#else
    Words words = rounded_words(as<Words>(lanes), noise_);
#ifdef __AVX2__
    // Packs the lower halves of both, then the upper ones.
    __m256i packed = _mm256_packus_epi32((__m256i)words.low, (__m256i)words.high);
    return (Halves)_mm256_permute4x64_epi64(packed, 0xd8);
#else
    uint32_t each[WIDE];
    uint16_t made[WIDE];
    Memory<Words>::store(each, words);
    for (int64_t i = 0; i < WIDE; ++i) made[i] = uint16_t(each[i]);
    return as<Halves>(made);
#endif
#endif
}

inline uint32_t place_of(const KilobasisUpdate& u, int64_t f, uint32_t salt) {
    return uint32_t(u.seed) * 0x27d4eb2fu + uint32_t(u.step) * 0xc2b2ae3du + uint32_t(u.first + f) * 0x9e3779b1u + salt;
}

// Rows move in float32: those that are bfloat16 are rounded up or down at random, so that steps that are too small for
// them add up all the same. `make` gives a row's numbers, one or sixteen at a time.
template <typename Make> void put_row(float* to, int64_t d, uint32_t, Make make) {
    along(d, [&](auto one, int64_t i) { put(to + i, make(one, i)); });
}

template <typename Make> void put_row(uint16_t* to, int64_t d, uint32_t place, Make make) {
    constexpr uint32_t LANE[WIDE] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, APART = 0x85ebca77u;
    Words places = place + Memory<Words>::load(LANE) * APART;
    int64_t i = 0;
    for (; i + WIDE <= d; i += WIDE, places += uint32_t(WIDE) * APART) {
        Halves halves = rounded(make(Lanes{}, i), noise(places));
        std::memcpy(to + i, &halves, sizeof halves);
    }
    if (i == d) return;
    float rest[WIDE] = {};
    for (int64_t j = i; j < d; ++j) rest[j - i] = make(0.0f, j);
    Halves halves = rounded(load(rest), noise(places));
    std::memcpy(to + i, &halves, (d - i) * sizeof *to);
}

// Without a first moment, steps in which a row had no gradient only let the second moment decay, which is caught up
// here: the same as if every row were visited in every step. A first moment decays with the gradients that there are.
struct Adam {
    float decay, correction, fresh, rate, epsilon;
    // How much of the first moment stays, how much of a gradient comes to it, and what its mean is made of it by.
    float stays, comes, whole;

    Adam(const KilobasisUpdate& u, int64_t f, float correction, float whole)
        : decay(float(std::pow(u.beta2, double(u.step - u.stamps[f])))), correction(correction),
          fresh(float((1 - u.beta2) * u.clip * u.clip)), rate(float(u.encoder_m ? u.rate : u.rate * u.clip)),
          epsilon(float(u.epsilon)), stays(float(u.beta1)), comes(float((1 - u.beta1) * u.clip)),
          whole(whole) {}

    // A row whose numbers have a second moment each, and perhaps first ones.
    template <typename W> void move(float* w, float* v, W* m, float* g, int64_t d, uint32_t place) const {
        for (int64_t i = 0; i < d; ++i) v[i] = decay * v[i] + fresh * (g[i] * g[i]);
        blend(m, g, d, place);
        for (int64_t i = 0; i < d; ++i) w[i] -= rate * g[i] / (std::sqrt(v[i] / correction) + epsilon);
    }

    // From a gradient to the mean of the last ones, where they are remembered.
    template <typename W> void blend(W* m, float* g, int64_t d, uint32_t place) const {
        if (!m) return;
        put_row(m, d, place, [&](auto one, int64_t i) {
            auto now = fused(of(one, stays), at(one, m + i), comes * at(one, g + i));
            put(g + i, now * whole);
            return now;
        });
    }

    // The rate of a row that has one, given the squared norm of its gradient.
    float rate_of(float* v, float square, int64_t d) const {
        *v = decay * *v + fresh * (square / float(d));
        return rate / (std::sqrt(*v / correction) + epsilon);
    }
};

// A feature's first moments.
template <typename W> W* first_of(void* moments, int64_t f, int64_t d) { return moments ? (W*)moments + f * d : nullptr; }

inline float inverse_length(float square) { return 1 / std::max(std::sqrt(square), 1e-12f); }

// A row that has one second moment: what is left of `gradient` moves it.
template <typename W>
void move_encoder(const KilobasisUpdate& u, const Adam& adam, W* row, int64_t f, Scratch& scratch) {
    float* gradient = scratch.encoder.data();
    float rate = adam.rate_of(u.encoder_v + f, float(scratch.encoder_square), u.encoder_d);
    adam.blend(first_of<W>(u.encoder_m, f, u.encoder_d), gradient, u.encoder_d, place_of(u, f, 3));
    put_row(row, u.encoder_d, place_of(u, f, 1), [&](auto one, int64_t i) {
        return fused(of(one, -rate), at(one, gradient + i), at(one, row + i));
    });
}

// The same of a decoder row, which stays a unit vector: what would only lengthen it is taken off its gradient.
template <typename W>
void move_decoder(const KilobasisUpdate& u, const Adam& adam, W* row, int64_t f, Scratch& scratch) {
    float *gradient = scratch.decoder.data(), *moved = scratch.row.data();
    float radial = -dot(gradient, row, u.decoder_d);
    float square = square_of(u.decoder_d, [&](auto one, int64_t i) {
        return put(gradient + i, fused(of(one, radial), at(one, row + i), at(one, gradient + i)));
    });
    float rate = adam.rate_of(u.decoder_v + f, square, u.decoder_d);
    adam.blend(first_of<W>(u.decoder_m, f, u.decoder_d), gradient, u.decoder_d, place_of(u, f, 4));
    float length = square_of(u.decoder_d, [&](auto one, int64_t i) {
        return put(moved + i, fused(of(one, -rate), at(one, gradient + i), at(one, row + i)));
    });
    float inverse = inverse_length(length);
    put_row(row, u.decoder_d, place_of(u, f, 2), [&](auto one, int64_t i) { return at(one, moved + i) * inverse; });
}

// Both rows of a feature, where each of their numbers has a second moment.
template <typename W>
void move_fully(const KilobasisUpdate& u, const Adam& adam, W* encoder, W* decoder, int64_t f, Scratch& scratch) {
    float *row = scratch.row.data(), *gradient = scratch.decoder.data();
    auto take = [&](const W* from, int64_t d) { along(d, [&](auto one, int64_t i) { put(row + i, at(one, from + i)); }); };
    take(encoder, u.encoder_d);
    W* m = first_of<W>(u.encoder_m, f, u.encoder_d);
    adam.move(row, u.encoder_v + f * u.encoder_d, m, scratch.encoder.data(), u.encoder_d, place_of(u, f, 3));
    put_row(encoder, u.encoder_d, place_of(u, f, 1), [&](auto one, int64_t i) { return at(one, row + i); });
    add_scaled(gradient, decoder, -dot(gradient, decoder, u.decoder_d), u.decoder_d);
    take(decoder, u.decoder_d);
    m = first_of<W>(u.decoder_m, f, u.decoder_d);
    adam.move(row, u.decoder_v + f * u.decoder_d, m, gradient, u.decoder_d, place_of(u, f, 4));
    float inverse = inverse_length(dot(row, row, u.decoder_d));
    put_row(decoder, u.decoder_d, place_of(u, f, 2), [&](auto one, int64_t i) { return at(one, row + i) * inverse; });
}

template <typename W> void update_rows(const KilobasisUpdate& u, W* encoder, W* decoder, double* squares) {
    const float correction = float(1 - std::pow(u.beta2, double(u.step)));
    const float whole = float(1 / (1 - std::pow(u.beta1, double(u.step))));
    visit(u, squares, [&](int64_t f, Scratch& scratch) {
        Adam adam(u, f, correction, whole);
        W *own_encoder = encoder + f * u.encoder_d, *own_decoder = decoder + f * u.decoder_d;
        if (u.row_wise) {
            move_encoder(u, adam, own_encoder, f, scratch);
            move_decoder(u, adam, own_decoder, f, scratch);
        } else {
            move_fully(u, adam, own_encoder, own_decoder, f, scratch);
        }
        float rate = adam.rate_of(u.bias_v + f, scratch.bias * scratch.bias, 1);
        if (u.bias_m) {
            u.bias_m[f] = adam.stays * u.bias_m[f] + adam.comes * scratch.bias;
            scratch.bias = adam.whole * u.bias_m[f];
        }
        u.bias[f] -= rate * scratch.bias;
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

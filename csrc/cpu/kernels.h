// What the CPU kernels do, one struct of arguments per operator. Shapes are row-major; T maps
// lead. With `contrast` rows [0, T/2) of a coefficient are P (positive) and rows [T/2, T) are D = P - N.
//
// Arithmetic is float for float and bfloat16 operands, double as soon as one operand is double. Masses are
// sums of fixed blocks, added in double in a fixed order: neither threads nor the neighbours in a batch
// matter.
#pragma once

#include <cstdint>

namespace rf {

enum class DType : std::uint8_t { f32, f64, bf16, i32 };  // i32: counts and numbers of steps

struct Operand {
    void* data = nullptr;  // null: absent
    DType dtype = DType::f32;
};

constexpr std::int64_t item_size(DType dtype) {
    return dtype == DType::f64 ? 8 : dtype == DType::bf16 ? 2 : 4;
}

struct StridedOperand {
    Operand operand;
    // Of the axes before the last one, which is contiguous: [T, B, rows] or [T, B, H, rows], in elements; 0
    // for T if there is none.
    std::int64_t strides[4];
};

// mass, rescale, rescale_parts and merge:
//   c = rescale(first, first_scale) + rescale(second, second_scale)      (absent parts are skipped)
//   out = c, or with a mass = sum |a| |c|
struct MergeArgs {
    std::int64_t num_maps, batch, inner;  // T, B, the rest
    bool contrast;
    Operand first, second;              // [T, B, inner]
    Operand first_scale, second_scale;  // [T, B]; with parts first_scale is [T, B, parts]
    std::int64_t parts, part_width;     // c is [T, B, ..., parts, part_width]
    Operand out;                        // [T, B, inner]
    Operand a;                          // [B, inner]
    Operand mass;                       // [T, B]
    int threads;
};

// The pull-back of a sum z = a + b, or z = relu(a + b) with `relu`, from one or two readers of z:
//   c = rescale(first, first_scale) + rescale(second, second_scale)      (as above), 2 [z > 0] c with `relu`
//   c_a = 2 [a > 0] c,  c_b = 2 [b > 0] c and their masses
// With gain and shift a = g x + h is a BatchNorm by channel, the innermost axis, and `a` holds z itself, the
// result of relu: a is z - b, and c_a goes on to x, |g| (1 + sign(a - h)) times as large. Its mass is that at
// a.
struct JunctionArgs {
    std::int64_t num_maps, batch, inner;
    bool contrast, relu;
    Operand first, second;              // [T, B, inner]; second may be absent
    Operand first_scale, second_scale;  // [T, B]; absent without second
    Operand a, b;                       // [B, inner]
    std::int64_t channels;
    Operand gain, shift;     // [channels], as for ScaleArgs
    Operand c_a, c_b;        // [T, B, inner]
    Operand mass_a, mass_b;  // [T, B]
    int threads;
};

// norm_pullback: c_x = (sign(x) w / sigma(x) + |w| / sigma(|x|)) c, sigma(u) = sqrt(var(u) + eps) over the
// last axis; norm_gradient: c_x = (w c - mean(w c)) / sigma(x).
struct NormArgs {
    std::int64_t num_maps, batch, rows, width;  // T, B, rows of one sample, normalised size
    double eps;
    Operand c;       // [T, B, rows, width]
    Operand x;       // [B, rows, width]
    Operand weight;  // [width] or absent
    Operand out;     // [T, B, rows, width]
    int threads;
};

// Columns of one panel of packed weights.
constexpr std::int64_t kLinearColumns = 32;

// out[r, i] = sum_k c[r, k] max(s W[k, i], 0), s the sign of x[r, i] (0: out is 0); W is packed (linear.cpp).
// With `norm` s is that of the output n of a LayerNorm of x, and out is multiplied by the LayerNorm's own
// factor (NormArgs); mass is sum |x| |out|, of P and N with `contrast`.
struct LinearArgs {
    std::int64_t num_maps, batch, rows, depth, width;  // T, B, rows of one sample, K, inputs
    bool norm, contrast;
    double eps;
    Operand c;             // [T, B, rows, depth], in the dtype of the panels
    Operand panels;        // [panels, steps, kLinearColumns, pack]
    Operand x;             // [B, rows, width]
    Operand weight, bias;  // [width] or absent
    Operand out;           // [T, B, rows, width]
    Operand mass;          // [T, B] or absent
    int threads;
};

// The depth of a matrix product in int8 slices (int8_slices.h): three products of slices, each up to 2^14,
// for every number of a row keep the sums below 2^31.
constexpr std::int64_t kInt8Depth = 1 << 15;

// out[r, i] = sum_k x[r, k] W[i, k] + bias[i]; x, out: bfloat16 or float
struct ProductArgs {
    std::int64_t rows, depth, width;  // depth is 1 or more, for float up to kInt8Depth
    Operand x;                        // [rows, depth]
    Operand tiles;  // of W, zero where there is no number. For bfloat16 [panels, steps, 2, 16, 32], panels of
                    // 32 columns and steps of 32; for float bytes [panels, 3 steps + 1, 16, 64], panels of 16
                    // columns, steps of 64 in three slices, and a block that begins with 16 floats: the
                    // scales of the columns
    Operand bias;   // [width], float, or absent
    Operand out;    // [rows, width]
    int threads;
};

// out = c * factor; with `gate` 2 c where factor > 0, else 0
// With gain and shift `factor` is the output y = g x + h of a BatchNorm, by channel the innermost axis, and
// |g| (1 + sign(y - h)) is what it multiplies by, with `gate` 2 [y > 0] times that.
// With n_scale the rows are pairs (P, D = P - N), and N is multiplied by it as well.
struct ScaleArgs {
    std::int64_t num_maps, batch, inner;  // T, B, the rest
    bool gate;
    Operand c, factor, out;  // [T, B, inner], [B, inner], [T, B, inner]
    Operand n_scale;         // [T / 2, B] or absent
    std::int64_t channels;   // with gain and shift
    Operand gain, shift;     // [channels], absent or float, or double if anything is
    int threads;
};

// out = c z / (d + stabilizer sign(d)), the sign of 0 being plus; 0 where that divides by 0, and where z is
// not on `side` (1: above zero, -1: below, 0: anywhere).
struct RatioArgs {
    std::int64_t num_maps, batch, inner;  // T, B, the rest
    double stabilizer;
    int side;
    Operand c, z, d, out;  // [T, B, inner], [B, inner], [B, inner], [T, B, inner]
    int threads;
};

// Elements in a row that a sample of coefficients takes.
constexpr std::int64_t kCentringRun = 32;

// n_scale = sum |P| w / sum |P - D| w over a sample of every row (1 where that is 0 or not finite), w being 1
// or what ScaleArgs multiplies by: what N has to be multiplied by to become as large as P. The sample is
// `runs` times so many, `step` apart, or the whole row of `inner` where runs is 0.
struct CentringArgs {
    std::int64_t num_maps, batch, inner;
    std::int64_t runs, step;
    bool gate;
    Operand c, factor;      // [T, B, inner], [B, inner] or absent
    std::int64_t channels;  // as for ScaleArgs
    Operand gain, shift;
    Operand out;  // [T / 2, B]
    int threads;
};

// out = c (times the maximum if not `divided`) at the first largest input of its window, else 0; windows of
// kernel_height x kernel_width lie side by side, channels are innermost.
struct MaxPoolArgs {
    std::int64_t num_maps, batch, height, width, channels;  // of the input
    std::int64_t kernel_height, kernel_width;
    bool divided;
    Operand c;    // [T, B, height / kernel_height, width / kernel_width, channels]
    Operand x;    // [B, height, width, channels]
    Operand out;  // [T, B, height, width, channels]
    int threads;
};

// out = the sum of c over the windows whose largest input this is; windows may overlap, channels are
// innermost.
struct UnpoolArgs {
    std::int64_t num_maps, batch, height, width, channels;  // of the input
    std::int64_t rows, columns;                             // of windows
    std::int64_t kernel[2], stride[2], padding[2];
    Operand c;        // [T, B, rows, columns, channels]
    Operand indices;  // [B, rows, columns, channels], int32: y width + x of a window's largest input
    Operand out;      // [T, B, height, width, channels]
    int threads;
};

// out[y, x, c] = acc[top + y / s, left + x / s, y % s, x % s, h, c], h = 0 where the input is positive, 1
// where it is negative, and 0 where it is 0; s = stride[0] for rows and stride[1] for columns.
struct SelectPhasesArgs {
    std::int64_t num_maps, batch, height, width, channels;  // of the input
    std::int64_t rows, columns;                             // of acc
    std::int64_t stride[2], top, left;
    Operand acc;  // [T, B, rows, columns, stride[0], stride[1], 2, channels]
    Operand x;    // [B, height, width, channels]
    Operand out;  // [T, B, height, width, channels], in the dtype of acc
    int threads;
};

// The positive and the negative part of every element, groups of channels apart; float arithmetic only.
struct SidesArgs {
    std::int64_t rows, width;  // groups of channels of all pixels, and channels in a group
    Operand x;                 // [rows, width]
    Operand out;               // [rows, 2, width]
    int threads;
};

// out[i] = the first step s with ks[s] > rank of scores[i] among its image's, `steps` if there is none; ranks
// are those of ordered.h.
struct MaskStepsArgs {
    std::int64_t batch, count, steps;
    bool descending;
    const std::int64_t* ks;  // [steps], ascending
    Operand scores;          // [B, count]
    Operand out;             // [B, count], int32
    int threads;
};

// out[s - first] = a where masked[i] <= s, else b, for steps s in [first, last); a is the baseline and b the
// image, or with `reveal` the other way round. Element (c, p) of an image is c pixels + p, or with
// channels_last p channels + c.
struct MaskedCopiesArgs {
    std::int64_t batch, channels, pixels, first, last;
    bool shared;            // one step for all channels of a pixel
    bool shared_baseline;   // one baseline for all images
    bool uniform_baseline;  // one value for all pixels
    bool channels_last, reveal;
    Operand images;    // [B, channels, pixels]
    Operand masked;    // [B, channels or 1, pixels], int32
    Operand baseline;  // [B or 1, channels, pixels or 1]
    Operand out;       // [last - first, B, channels, pixels]
    int threads;
};

// order = the entries of an image by their step, those of one step in ascending order; begins[s] = how many
// have a smaller step than s. Steps are cut to [0, steps].
struct OrderByStepArgs {
    std::int64_t batch, count, steps;
    Operand masked;  // [B, count], int32
    Operand order;   // [B, count], int32
    Operand begins;  // [B, steps + 1], int32
    int threads;
};

// Copy i of an image, as masked by step first + i, becomes that of step first + i + by: the entries in
// between take the values of the source.
struct AdvanceCopiesArgs {
    std::int64_t copies, batch, channels, pixels, first, by, steps;
    bool shared;          // entries are pixels, of all channels
    bool shared_source;   // one for all images
    bool uniform_source;  // one value for all pixels
    bool channels_last;
    Operand source;         // [B or 1, channels, pixels or 1]
    Operand order, begins;  // [B, channels pixels or pixels], [B, steps + 1]: OrderByStepArgs
    Operand out;            // [copies, B, channels, pixels]
    int threads;
};

enum class Activation : std::uint8_t { gelu, gelu_tanh, silu, hardswish, sigmoid, hardsigmoid };

// y = f(x), factor = [y > 0] (sign(x) f'(x) + f'(|x|)); float arithmetic only. With gain and shift x is a
// BatchNorm of something by channel, the innermost axis, and the factor |g| (1 + sign(x - h)) times that.
struct FactorArgs {
    std::int64_t inner, channels;
    Activation function;
    Operand x, y, factor;  // the last may be absent
    Operand gain, shift;   // [channels]
    int threads;
};

// y = f(x), factor = f(x) / x, 0 where x is 0; float arithmetic only. Not of the sigmoids.
struct ShareArgs {
    std::int64_t inner;
    Activation function;
    Operand x, y, factor;
    int threads;
};

// y = g x + h per channel, cut to [0, cap] with `relu`; factor = sign(x) g + |g|, with `relu` 2 [y > 0] times
// that; float arithmetic only. Element (o, c, i) of [outer, channels, inner]: inner is 1 for channels-last.
struct AffineArgs {
    std::int64_t outer, channels, inner;
    bool relu;
    float cap;
    Operand x, y, factor;
    Operand gain, shift;  // [channels], float
    int threads;
};

// The pull-back of z = a b, b one number by channel, the innermost axis: with g = 2 [a b > 0] c
//   c_a = |b| g, its mass, c_b = sum_rows |a| g
struct MulArgs {
    std::int64_t num_maps, batch, rows, channels;
    bool contrast;
    Operand c, c_a;  // [T, B, rows, channels]
    Operand a;       // [B, rows, channels]
    Operand b;       // [B, channels]
    Operand c_b;     // [T, B, channels]
    Operand mass;    // [T, B]
    int threads;
};

// The pull-back of a sum over rows, out = 2 [x > 0] c, and its mass.
struct SpreadArgs {
    std::int64_t num_maps, batch, rows, channels;
    bool contrast;
    Operand c;     // [T, B, channels]
    Operand x;     // [B, rows, channels]
    Operand out;   // [T, B, rows, channels]
    Operand mass;  // [T, B]
    int threads;
};

// Masses of pieces of the channels, `widths` of them one after the other.
struct PieceMassArgs {
    std::int64_t num_maps, batch, rows, channels, pieces;
    bool contrast;
    const std::int64_t* widths;  // [pieces], `channels` in all
    Operand c;                   // [T, B, rows, channels]
    Operand x;                   // [B, rows, channels]
    Operand masses;              // [pieces, T, B]
    int threads;
};

// out = the sum over pieces of rescale(piece, scale)
struct MergePiecesArgs {
    std::int64_t num_maps, batch, rows, channels, pieces;
    bool contrast;
    const StridedOperand* from;  // [pieces] of [T, B, rows, channels], channels dense
    Operand scales;              // [pieces, T, B]
    Operand out;                 // [T, B, rows, channels]
    int threads;
};

// The pull-back of a product with one number by channel as its gradient, times `share`: c_a = share b c,
// c_b = share sum a c.
struct MulGradientArgs {
    std::int64_t num_maps, batch, rows, channels;
    double share;
    Operand c, c_a;  // [T, B, rows, channels]
    Operand a;       // [B, rows, channels]
    Operand b;       // [B, channels]
    Operand c_b;     // [T, B, channels]
    int threads;
};

// A depthwise convolution of images whose channels are innermost, or with `transposed` its transpose, of
// every map: out = sum of weight * source over the window. With x the weight is the first half where x > 0,
// the second where x < 0, and nothing where it is 0; with `by_source` the sign of the source chooses. Float
// arithmetic only.
struct DepthwiseArgs {
    std::int64_t num_maps, batch, channels;
    std::int64_t in_size[2], out_size[2], kernel[2], stride[2], padding[2], dilation[2];
    bool transposed, relu, by_source;
    Operand source;  // [T, B, in_size, channels]
    Operand weight;  // [1 or 2, kernel, channels], float
    Operand bias;    // [channels], float, or absent
    Operand x;       // [B, out_size, channels], or absent
    Operand out;     // [T, B, out_size, channels]
    int threads;
};
constexpr std::int64_t kMostTaps = 32;  // of a window along an axis

// c_s = (sign(s) softmax(s) + softmax(|s|)) c, rows of `width` scores; -inf is masked: excluded, gives 0
struct SoftmaxArgs {
    std::int64_t num_maps, rows, width;
    Operand scores;  // [rows, width]
    Operand c, out;  // [T, rows, width]
    int threads;
};

// The pull-back of O = A V, A = softmax(S), S = scale Q K^T (+ bias); g = [o > 0] c if gated, else c:
//   c_A = 2 g V+^T,  c_V = 2 [v > 0] A^T g,  c_S = (sign(S) A + softmax(|S|)) c_A
//   c_Q = 2 scale (c_S K+ where scale q > 0; if not gated c_S K- where scale q < 0; else 0)
//   c_K = 2 (c_S^T (scale Q)+ where k > 0; if not gated c_S^T (scale Q)- where k < 0; else 0)
struct AttentionArgs {
    std::int64_t num_maps, batch, heads, queries, keys, width;  // T, B, H, N, M, D
    bool gated, contrast;
    double scale;
    StridedOperand q, k, v, o, c;  // [B, H, N or M, D]; c [T, B, H, N, D]
    StridedOperand c_q, c_k, c_v;  // [T, B, H, N or M, D]
    // [G, H, N, M], or absent: what is added to the scores of sample b is bias b % G; -inf is masked, and a
    // row may be so as a whole.
    StridedOperand bias;
    std::int64_t biases;  // G
    // Whether the bias takes relevance as a term of S: 2 [scale q k > 0] c_S goes on to Q and K, and there
    // are masses of Q K^T and of the bias.
    bool junction;
    Operand masses;  // [4 or 6, T, B]: of A, V, Q, K, and of scale Q K^T and the bias
    int threads;
};

// The gradient of the same O, times `value_share` for V and `score_share` for Q and K; where that is 0 so are
// c_Q and c_K:
//   c_A = c V^T,  c_V = A^T c,  c_S = A (c_A - sum_keys A c_A),  c_Q = scale c_S K,  c_K = scale c_S^T Q
struct AttentionGradientArgs {
    std::int64_t num_maps, batch, heads, queries, keys, width;
    double scale, value_share, score_share;
    StridedOperand q, k, v, c, c_q, c_k, c_v, bias;  // as for AttentionArgs
    std::int64_t biases;
    int threads;
};

// A linear map of rows that mixes an element with its partner only, which is `pair` elements further on in
// every first half of 2 pair elements, and as many back in the second half: y = stay x + (cross x) of the
// partner. Rows before `first` are moved as they are. With c the pull-back of that: a weight w is |w| +
// sign(x) w, and
//   out = s c in rows that are moved, r (stay c + cross (c of the partner)) in those that are turned,
// s such that c has the mass `target` at y, r such that turned rows have at x what they have at y. Without y
// all rows are turned, and have the mass `target` together.
struct RotaryArgs {
    std::int64_t num_maps, batch, heads, rows, width;  // T, B, H, N, D
    std::int64_t first, pair;
    bool contrast;
    std::int64_t weight_heads;  // H, or 1 for the same weights in all heads
    StridedOperand x, y;        // [B, H, N, D]; y may be absent where there is c
    Operand stay, cross;        // [weight_heads, N - first, D]
    StridedOperand c, out;      // [T, B, H, N, D], or absent
    Operand target, mass;       // [T, B]
    int threads;
};

// The pull-back of a gate z = a b, entry by entry, and on through a = f(x) with `factor`: with g = 2 [a b >
// 0] c
//   c_a = |b| g,  c_b = |a| g,  and their masses; with factor c_a is factor |b| g, and its mass is that at x
struct GatingArgs {
    std::int64_t num_maps, batch, rows, width;
    bool contrast;
    Operand c, c_a, c_b;                     // [T, B, rows, width]
    Operand a, b, x, factor;                 // [B, rows, width]; the last two may be absent
    std::int64_t of_a[2], of_b[2], of_x[2];  // from sample to sample and from row to row, in elements
    Operand mass_a, mass_b;                  // [T, B]
    int threads;
};

// out = rescale(c, scale), of [T, B, H, rows, width] wherever they lie, but for the last axis
struct PlaceArgs {
    std::int64_t num_maps, batch, heads, rows, width;
    bool contrast;
    StridedOperand c, out;
    Operand scale;  // [T, B]
    int threads;
};

// Of `count` pieces of memory.
struct ChecksumArgs {
    const std::uint64_t* addresses;
    const std::int64_t* bytes;
    const std::uint8_t* sampled;  // whether one line in 64 is enough
    std::uint64_t* out;
    std::int64_t count, total;  // of bytes
    int threads;
};

#define RF_DECLARE_KERNELS(isa)                            \
    namespace isa {                                        \
    void checksum(const ChecksumArgs&);                    \
    void merge(const MergeArgs&);                          \
    void junction(const JunctionArgs&);                    \
    void centring(const CentringArgs&);                    \
    void norm_pullback(const NormArgs&);                   \
    void norm_gradient(const NormArgs&);                   \
    void max_pool_pullback(const MaxPoolArgs&);            \
    void unpool(const UnpoolArgs&);                        \
    void select_phases(const SelectPhasesArgs&);           \
    void sides(const SidesArgs&);                          \
    void mask_steps(const MaskStepsArgs&);                 \
    void masked_copies(const MaskedCopiesArgs&);           \
    void order_by_step(const OrderByStepArgs&);            \
    void advance_copies(const AdvanceCopiesArgs&);         \
    void linear_pullback(const LinearArgs&);               \
    void scale_by(const ScaleArgs&);                       \
    void ratio(const RatioArgs&);                          \
    void activation_factor(const FactorArgs&);             \
    void activation_share(const ShareArgs&);               \
    void affine_factor(const AffineArgs&);                 \
    void softmax_pullback(const SoftmaxArgs&);             \
    void depthwise(const DepthwiseArgs&);                  \
    void mul_pullback(const MulArgs&);                     \
    void mul_gradient(const MulGradientArgs&);             \
    void spread(const SpreadArgs&);                        \
    void piece_masses(const PieceMassArgs&);               \
    void merge_pieces(const MergePiecesArgs&);             \
    void rotary(const RotaryArgs&);                        \
    void rotary_pullback(const RotaryArgs&);               \
    void gating_pullback(const GatingArgs&);               \
    void rescale_piece(const PlaceArgs&);                  \
    void attention_pullback(const AttentionArgs&);         \
    void attention_gradient(const AttentionGradientArgs&); \
    }

RF_DECLARE_KERNELS(generic)
RF_DECLARE_KERNELS(avx2)
RF_DECLARE_KERNELS(avx512)

namespace avx512bf16 {
// The others gain nothing: there it is the avx512 ones.
void attention_pullback(const AttentionArgs&);
void attention_gradient(const AttentionGradientArgs&);
void linear_pullback(const LinearArgs&);
void norm_pullback(const NormArgs&);
void norm_gradient(const NormArgs&);
void junction(const JunctionArgs&);
void rotary(const RotaryArgs&);
void rotary_pullback(const RotaryArgs&);
void gating_pullback(const GatingArgs&);
void rescale_piece(const PlaceArgs&);
}  // namespace avx512bf16

namespace amx {
void attention_pullback(const AttentionArgs&);
void attention_gradient(const AttentionGradientArgs&);
void linear_pullback(const LinearArgs&);
void product(const ProductArgs&);  // there is no other
// Parts of the last two.
void linear_pullback_tiles(const LinearArgs&);
void linear_pullback_int8(const LinearArgs&);
void product_int8(const ProductArgs&);
}  // namespace amx

}  // namespace rf

// Sub-pixel (polyphase) transposed convolutions: a convolution of stride s has been pulled back as one of
// stride one whose s x s groups of outputs are the phases, pixels of one cell. They are put where they
// belong, of W+ or of W- by the sign of the input. And the other way round: positive and negative parts of
// an input, for a product with weights for either.
#include "cpu/lanes.h"

namespace rf::RF_ISA {
namespace {

// One line of one sample of the input, for all maps: as many pixels at once as fit into a block, or as many
// channels of one pixel.
template <class F, class Stored>
void select_line(int64_t index, const void* context, void*) {
    const SelectPhasesArgs& args = *static_cast<const SelectPhasesArgs*>(context);
    const int64_t channels = args.channels, b = index / args.height, y = index % args.height;
    const int64_t cell = args.stride[0] * args.stride[1] * 2 * channels;  // of acc
    const int64_t block = channels < kBlock ? kBlock / channels : 1;      // of pixels
    F in[kBlock];
    for (int64_t t = 0; t < args.num_maps; ++t) {
        const int64_t sample = t * args.batch + b;
        const Stored* const line =
            static_cast<const Stored*>(args.acc.data) +
            (sample * args.rows + args.top + y / args.stride[0]) * args.columns * cell +
            y % args.stride[0] * args.stride[1] * 2 * channels;
        Stored* const out =
            static_cast<Stored*>(args.out.data) + (sample * args.height + y) * args.width * channels;
        const int64_t phases = args.stride[1];
        for (int64_t first = 0; first < channels; first += kBlock) {
            const int64_t some = min64(kBlock, channels - first);
            for (int64_t start = 0; start < args.width; start += block) {
                const int64_t n = min64(block, args.width - start), at = start * channels + first;
                const F* x = load(args.x, (b * args.height + y) * args.width * channels + at,
                                  some < channels ? some : n * channels, in);
                int64_t column = args.left + start / phases, phase = start % phases;
                for (int64_t i = 0; i < n * channels; i += channels) {
                    const Stored* const from = line + column * cell + phase * 2 * channels + first;
                    RF_SIMD
                    for (int64_t k = 0; k < some; ++k)
                        out[at + i + k] = x[i + k] > F(0)   ? from[k]
                                          : x[i + k] < F(0) ? from[channels + k]
                                                            : Stored(0);
                    if (++phase == phases) {
                        phase = 0;
                        ++column;
                    }
                }
            }
        }
    }
}

template <class F>
Task task_for(DType stored) {
    // bfloat16 is moved as it is.
    return stored == DType::f64   ? select_line<F, double>
           : stored == DType::f32 ? select_line<F, float>
                                  : select_line<F, std::uint16_t>;
}

template <class V, DType dtype>
RF_INLINE void split(const SidesArgs& args, int64_t row, int64_t channel) {
    const V x = read<V>({args.x.data, dtype}, row * args.width + channel);
    const int64_t to = 2 * row * args.width + channel;
    write<V>(args.out, to, x < 0.0f ? V{} : x, false);  // NaN stays, on both sides
    write<V>(args.out, to + args.width, x > 0.0f ? V{} : x, false);
}

// Where the last vector of a row would be a part of one, it begins earlier.
template <DType dtype>
void split_rows(int64_t index, const void* context, void*) {
    const SidesArgs& args = *static_cast<const SidesArgs*>(context);
    const int64_t step = rows_of_task(args.width), end = min64((index + 1) * step, args.rows);
    for (int64_t row = index * step; row < end; ++row) {
        if (args.width < kLanes) {
            for (int64_t c = 0; c < args.width; ++c) split<float, dtype>(args, row, c);
            continue;
        }
        for (int64_t c = 0; c < args.width; c += kLanes)
            split<Lanes, dtype>(args, row, min64(c, args.width - kLanes));
    }
}

}  // namespace

void sides(const SidesArgs& args) {
    const Task task = args.x.dtype == DType::bf16 ? split_rows<DType::bf16> : split_rows<DType::f32>;
    parallel_for(ceil_div(args.rows, rows_of_task(args.width)), args.rows * args.width, args.threads, task,
                 &args, 0);
}

void select_phases(const SelectPhasesArgs& args) {
    if (args.channels == 0) return;
    const Task task =
        args.x.dtype == DType::f64 ? task_for<double>(args.acc.dtype) : task_for<float>(args.acc.dtype);
    parallel_for(args.batch * args.height,
                 args.num_maps * args.batch * args.height * args.width * args.channels, args.threads, task,
                 &args, 0);
}

}  // namespace rf::RF_ISA

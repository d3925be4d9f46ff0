// Pieces of the channels of images, as concatenations have them: the masses of the pieces of one tensor, and
// sums of pieces of several.
#include "cpu/lanes.h"
#include "cpu/mass.h"

namespace rf::RF_ISA {
namespace {

template <class Args>
struct Job {
    const Args& args;
    int64_t step, chunks;  // rows of a task, tasks of a sample
    double* partials;      // [B, chunks, pieces, T]

    int64_t sample(int64_t index) const { return index / chunks; }
    int64_t first(int64_t index) const { return index % chunks * step; }
    int64_t last(int64_t index) const { return min64(first(index) + step, args.rows); }
};

template <class Args>
Job<Args> job_of(const Args& args, double* partials) {
    const int64_t step = rows_of_task(args.channels);
    return {args, step, ceil_div(args.rows, step), partials};
}

// Adds sums of n channels from `start` on to the masses of their pieces, [pieces, T].
template <class F>
RF_INLINE void add_to_pieces(const PieceMassArgs& args, const F* __restrict sums, int64_t start, int64_t n,
                             double* masses) {
    int64_t begin = 0;
    for (int64_t piece = 0; piece < args.pieces && begin < start + n; ++piece) {
        const int64_t end = begin + args.widths[piece];
        const int64_t from = begin > start ? begin - start : 0, to = min64(end - start, n);
        F sum = 0;
        RF_SIMD_SUM(sum)
        for (int64_t i = from; i < to; ++i) sum += sums[i];
        if (from < to) masses[piece * args.num_maps] += static_cast<double>(sum);
        begin = end;
    }
}

template <class F, bool contrast>
void mass_rows(int64_t index, const void* context, void*) {
    const auto& job = *static_cast<const Job<PieceMassArgs>*>(context);
    const PieceMassArgs& args = job.args;
    const int64_t b = job.sample(index), channels = args.channels, last = job.last(index);
    const int64_t groups = contrast ? args.num_maps / 2 : args.num_maps;
    const int64_t map_stride = args.batch * args.rows * channels;
    double* const masses = job.partials + index * args.pieces * args.num_maps;
    for (int64_t i = 0; i < args.pieces * args.num_maps; ++i) masses[i] = 0;
    F x_in[kBlock], p_in[kBlock], d_in[kBlock], sums_p[kBlock], sums_n[kBlock];
    for (int64_t start = 0; start < channels; start += kBlock) {
        const int64_t n = min64(kBlock, channels - start);
        for (int64_t t = 0; t < groups; ++t)
            // Sums of float over more rows than these would lose digits.
            for (int64_t from = job.first(index); from < last; from += kBlock) {
                for (int64_t i = 0; i < n; ++i) sums_p[i] = sums_n[i] = 0;
                for (int64_t row = from; row < min64(from + kBlock, last); ++row) {
                    const int64_t at = (b * args.rows + row) * channels + start;
                    const F* __restrict x = load_ahead(args.x, at, n, x_in);
                    const F* __restrict p = load_ahead(args.c, t * map_stride + at, n, p_in);
                    const F* __restrict d =
                        contrast ? load_ahead(args.c, (t + groups) * map_stride + at, n, d_in) : p;
                    RF_SIMD
                    for (int64_t i = 0; i < n; ++i) {
                        const F magnitude = absolute(x[i]);
                        sums_p[i] += magnitude * absolute(p[i]);
                        if (contrast) sums_n[i] += magnitude * absolute(p[i] - d[i]);
                    }
                }
                add_to_pieces(args, sums_p, start, n, masses + t);
                if (contrast) add_to_pieces(args, sums_n, start, n, masses + t + groups);
            }
    }
}

// Rows ahead that are fetched: rows of a piece are as far apart as those of the tensor that it was cut from.
constexpr int64_t kRowsAhead = 8;

// Elements [first, last) of a row, whose pieces are read in the loop that adds them. Where D is P, N is zero:
// it stays so, to the last bit, as where two are added.
template <class V, DType dtype, class F, bool contrast>
RF_INLINE void merge_span(const MergePiecesArgs& args, int64_t t, int64_t b, int64_t row, int64_t first,
                          int64_t last) {
    const int64_t groups = contrast ? args.num_maps / 2 : args.num_maps;
    const int64_t cell = t * args.batch + b, cell_d = cell + groups * args.batch;
    const int64_t of_d = groups * args.batch * args.rows * args.channels;  // in the result, after P
    const Operand out{args.out.data, dtype};
    constexpr int64_t step = sizeof(V) / sizeof(F);
    for (int64_t i = first; i < last; i += step) {
        V sum_p{}, sum_d{};
        for (int64_t piece = 0; piece < args.pieces; ++piece) {
            const StridedOperand& from = args.from[piece];
            const Operand source{from.operand.data, dtype};
            const int64_t at = t * from.strides[0] + b * from.strides[1] + row * from.strides[2] + i;
            const int64_t scale = piece * args.num_maps * args.batch;
            const F scale_p = load_one<F>(args.scales, scale + cell);
            const V p = read<V>(source, at), before = sum_p;
            sum_p += scale_p * p;
            if (contrast) {
                const F scale_n = load_one<F>(args.scales, scale + cell_d);
                const V d = read<V>(source, at + groups * from.strides[0]);
                const V other = sum_d + (scale_n * d + (scale_p - scale_n) * p);
                const auto zero_n = (d == p) & (sum_d == before);
                sum_d = zero_n ? sum_p : other;
            }
        }
        const int64_t to = (cell * args.rows + row) * args.channels + i;
        write<V>(out, to, sum_p, false);
        if (contrast) write<V>(out, to + of_d, sum_d, false);
    }
}

template <class F, DType dtype, bool contrast>
void merge_rows(int64_t index, const void* context, void*) {
    const auto& job = *static_cast<const Job<MergePiecesArgs>*>(context);
    const MergePiecesArgs& args = job.args;
    const int64_t b = job.sample(index), last = job.last(index);
    const int64_t whole = sizeof(F) == sizeof(float) ? args.channels / kLanes * kLanes : 0;
    for (int64_t row = job.first(index); row < last; ++row) {
        if (row + kRowsAhead < last)
            for (int64_t piece = 0; piece < args.pieces; ++piece)
                for (int64_t t = 0; t < args.num_maps; ++t) {
                    const std::int64_t* strides = args.from[piece].strides;
                    fetch(args.from[piece].operand,
                          t * strides[0] + b * strides[1] + (row + kRowsAhead) * strides[2], args.channels);
                }
        for (int64_t t = 0; t < (contrast ? args.num_maps / 2 : args.num_maps); ++t) {
            if constexpr (sizeof(F) == sizeof(float))
                merge_span<Lanes, dtype, F, contrast>(args, t, b, row, 0, whole);
            merge_span<F, dtype, F, contrast>(args, t, b, row, whole, args.channels);
        }
    }
}

template <class F, DType dtype>
Task merge_task(const MergePiecesArgs& args) {
    return args.contrast ? merge_rows<F, dtype, true> : merge_rows<F, dtype, false>;
}

// Arithmetic in double, of pieces of any dtype.
Task wide_merge_task(const MergePiecesArgs& args) {
    return args.out.dtype == DType::f64   ? merge_task<double, DType::f64>(args)
           : args.out.dtype == DType::f32 ? merge_task<double, DType::f32>(args)
                                          : merge_task<double, DType::bf16>(args);
}

}  // namespace

void piece_masses(const PieceMassArgs& args) {
    const int64_t chunks = job_of(args, nullptr).chunks, sums = args.pieces * args.num_maps;
    const Partials partials(args.batch * chunks * sums);
    const auto job = job_of(args, partials.data());
    const bool wide = any_double(args.c, args.x);
    const Task task = wide ? (args.contrast ? mass_rows<double, true> : mass_rows<double, false>)
                           : (args.contrast ? mass_rows<float, true> : mass_rows<float, false>);
    const int64_t work = args.num_maps * args.batch * args.rows * args.channels;
    parallel_for(args.batch * chunks, work, args.threads, task, &job, 0);
    for (int64_t piece = 0; piece < args.pieces; ++piece)
        store_masses(args.masses, piece * args.num_maps * args.batch, args.num_maps, args.batch,
                     partials.data() + piece * args.num_maps, chunks, sums);
}

void merge_pieces(const MergePiecesArgs& args) {
    const auto job = job_of(args, nullptr);
    const Task task = any_double(args.out, args.scales) ? wide_merge_task(args)
                      : args.out.dtype == DType::f32    ? merge_task<float, DType::f32>(args)
                                                        : merge_task<float, DType::bf16>(args);
    const int64_t work = args.num_maps * args.batch * args.rows * args.channels * args.pieces;
    parallel_for(args.batch * job.chunks, work, args.threads, task, &job, 0);
}

}  // namespace rf::RF_ISA

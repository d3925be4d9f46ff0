// The pull-back of a sum, of one followed by a ReLU, and of one followed by a ReLU of which an operand is a
// BatchNorm.
#include "cpu/channels.h"
#include "cpu/lanes.h"
#include "cpu/mass.h"

namespace rf::RF_ISA {
namespace {

enum class Kind { sum, relu, norm };

// Results of this many bytes leave the caches before they are read: streaming stores do not read what they
// overwrite first.
constexpr int64_t kStreamBytes = int64_t(12) << 20;

template <class F>
struct Junction {
    const JunctionArgs& args;
    Channels<F> channels;  // of a norm
    int64_t chunks;        // of one sample
    int64_t groups;        // pairs (P, D), or single rows
    double* partials;      // [B, chunks, a or b, T]
    bool stream;           // results by streaming stores
};

// What the readers of the sum are scaled by.
template <class F>
struct Scales {
    F first_p, first_n, second_p, second_n;
};

struct Sums {
    double *a_p, *a_n, *b_p, *b_n;
};

// The dtypes of the readers' coefficients, of the operands and of the two results. Those that attributions
// have are known to the compiler, or every read and write in the loop would begin with a test.
struct AnyTypes {
    static bool fit(const JunctionArgs&) { return true; }
    static JunctionArgs set(const JunctionArgs& args) { return args; }
};

template <DType coefficient, DType value, DType result_a, DType result_b>
struct Types {
    static bool fit(const JunctionArgs& args) {
        return args.first.dtype == coefficient &&
               (args.second.data == nullptr || args.second.dtype == coefficient) && args.a.dtype == value &&
               args.b.dtype == value && args.c_a.dtype == result_a && args.c_b.dtype == result_b;
    }
    static RF_INLINE JunctionArgs set(JunctionArgs args) {
        args.first.dtype = args.second.dtype = coefficient;
        args.a.dtype = args.b.dtype = value;
        args.c_a.dtype = result_a;
        args.c_b.dtype = result_b;
        return args;
    }
};

// Elements [start, start + n) of one row, or with contrast a pair of rows. Gates are factors, 0 where they
// are shut (coefficients are finite): several selections would compete for the mask registers.
template <class V, class Dtypes, class F, bool contrast, bool two, Kind kind>
RF_INLINE void junction_span(const Junction<F>& job, const Scales<F>& scales, int64_t b, int64_t row,
                             int64_t row_d, int64_t start, int64_t n, const Sums& sums) {
    const JunctionArgs args = Dtypes::set(job.args);  // a copy, which nothing that is written here can change
    const bool stream = job.stream;
    constexpr int64_t step = sizeof(V) / sizeof(F);
    const int64_t of_sample = b * args.inner;
    const V zero{};
    V sum_a_p{}, sum_a_n{}, sum_b_p{}, sum_b_n{};
    int64_t channel = kind == Kind::norm ? job.channels.at(start) : 0;
    for (int64_t i = start; i < start + n; i += step) {
        const V left = read<V>(args.a, of_sample + i), right = read<V>(args.b, of_sample + i);
        const V z = kind == Kind::norm ? left : left + right;
        const V a = kind == Kind::norm ? left - right : left;
        const V open = kind == Kind::sum ? zero + F(2) : (z > zero ? zero + F(4) : zero);
        const V open_a = a > zero ? open : zero, open_b = right > zero ? open : zero;
        V to_a = open_a;
        if constexpr (kind == Kind::norm) {
            const V size = *reinterpret_cast<const V*>(job.channels.size + channel);
            const V shift = *reinterpret_cast<const V*>(job.channels.shift + channel);
            to_a = open_a * (a > shift ? size + size : (a == shift ? size : zero));
            channel += step;
        }
        const V mass_a = open * (a > zero ? a : zero), mass_b = open * (right > zero ? right : zero);

        V of_p = read<V>(args.first, row + i), of_d{};
        if (contrast) of_d = read<V>(args.first, row_d + i);
        if constexpr (two) {
            const V q = read<V>(args.second, row + i);
            if (contrast) {
                const V e = read<V>(args.second, row_d + i);
                const V scaled = (scales.first_n * of_d + (scales.first_p - scales.first_n) * of_p) +
                                 (scales.second_n * e + (scales.second_p - scales.second_n) * q);
                const auto zero_n = (of_d == of_p) & (e == q);  // which it stays, to the last bit
                of_p = scales.first_p * of_p + scales.second_p * q;
                of_d = zero_n ? of_p : scaled;
            } else {
                of_p = scales.first_p * of_p + scales.second_p * q;
            }
        }
        write<V>(args.c_a, row + i, to_a * of_p, stream);
        write<V>(args.c_b, row + i, open_b * of_p, stream);
        sum_a_p += mass_a * magnitude<V>(of_p);
        sum_b_p += mass_b * magnitude<V>(of_p);
        if (contrast) {
            write<V>(args.c_a, row_d + i, to_a * of_d, stream);
            write<V>(args.c_b, row_d + i, open_b * of_d, stream);
            const V of_n = magnitude<V>(of_p - of_d);
            sum_a_n += mass_a * of_n;
            sum_b_n += mass_b * of_n;
        }
    }
    *sums.a_p += static_cast<double>(total<F>(sum_a_p));
    *sums.b_p += static_cast<double>(total<F>(sum_b_p));
    if (contrast) {
        *sums.a_n += static_cast<double>(total<F>(sum_a_n));
        *sums.b_n += static_cast<double>(total<F>(sum_b_n));
    }
}

template <class F, class Dtypes, bool contrast, bool two, Kind kind>
void junction_chunk(int64_t index, const void* context, void*) {
    const Junction<F>& job = *static_cast<const Junction<F>*>(context);
    const JunctionArgs& args = job.args;
    const int64_t b = index / job.chunks;
    const int64_t begin = index % job.chunks * kChunk, end = min64(begin + kChunk, args.inner);
    double* partials = job.partials + index * 2 * args.num_maps;
    for (int64_t t = 0; t < 2 * args.num_maps; ++t) partials[t] = 0;
    // Floats, the tail apart, go by vectors.
    constexpr bool vectors = sizeof(F) == sizeof(float);
    for (int64_t start = begin; start < end; start += kBlock) {
        const int64_t n = min64(kBlock, end - start), whole = vectors ? n / kLanes * kLanes : 0;
        const int64_t next = start + kBlock;
        fetch(args.a, b * args.inner + next, kBlock);
        fetch(args.b, b * args.inner + next, kBlock);
        for (int64_t t = 0; t < job.groups; ++t) {
            const int64_t cell = t * args.batch + b, cell_d = cell + args.num_maps / 2 * args.batch;
            const int64_t row = cell * args.inner, row_d = cell_d * args.inner;
            Scales<F> scales{};
            fetch(args.first, row + next, kBlock);
            if (contrast) fetch(args.first, row_d + next, kBlock);
            if (two) {
                fetch(args.second, row + next, kBlock);
                scales.first_p = load_one<F>(args.first_scale, cell);
                scales.second_p = load_one<F>(args.second_scale, cell);
                if (contrast) {
                    fetch(args.second, row_d + next, kBlock);
                    scales.first_n = load_one<F>(args.first_scale, cell_d);
                    scales.second_n = load_one<F>(args.second_scale, cell_d);
                }
            }
            double* const of_b = partials + args.num_maps;
            const int64_t half = args.num_maps / 2;
            const Sums sums{partials + t, partials + t + half, of_b + t, of_b + t + half};
            if constexpr (vectors)
                junction_span<Lanes, Dtypes, F, contrast, two, kind>(job, scales, b, row, row_d, start, whole,
                                                                     sums);
            if (whole < n)
                junction_span<F, Dtypes, F, contrast, two, kind>(job, scales, b, row, row_d, start + whole,
                                                                 n - whole, sums);
        }
    }
#ifdef __AVX512F__
    if (job.stream) _mm_sfence();
#endif
}

// Whether results are too large for the caches, and aligned as streaming stores ask for.
inline bool streams(const JunctionArgs& args) {
    int64_t bytes = 0;
    std::uintptr_t bits = static_cast<std::uintptr_t>(args.inner) * 2;
    for (const Operand* out : {&args.c_a, &args.c_b}) {
        bytes += args.num_maps * args.batch * args.inner * item_size(out->dtype);
        bits |= reinterpret_cast<std::uintptr_t>(out->data);
    }
    return bytes >= kStreamBytes && bits % 64 == 0;
}

template <class F, class Dtypes, bool contrast, bool two>
Task task_of(Kind kind) {
    return kind == Kind::norm   ? junction_chunk<F, Dtypes, contrast, two, Kind::norm>
           : kind == Kind::relu ? junction_chunk<F, Dtypes, contrast, two, Kind::relu>
                                : junction_chunk<F, Dtypes, contrast, two, Kind::sum>;
}

// That of the first `Dtypes` that fit.
template <class F, class Dtypes, class... Others>
Task task_for(const JunctionArgs& args, Kind kind) {
    if constexpr (sizeof...(Others) > 0)
        if (!Dtypes::fit(args)) return task_for<F, Others...>(args, kind);
    if (args.second.data)
        return args.contrast ? task_of<F, Dtypes, true, true>(kind) : task_of<F, Dtypes, false, true>(kind);
    return args.contrast ? task_of<F, Dtypes, true, false>(kind) : task_of<F, Dtypes, false, false>(kind);
}

template <class F, class... Dtypes>
void run(const JunctionArgs& args) {
    const bool norm = args.gain.data != nullptr;
    const Kind kind = norm ? Kind::norm : args.relu ? Kind::relu : Kind::sum;
    const int64_t chunks = ceil_div(args.inner, kChunk), tasks = args.batch * chunks;
    Partials partials(tasks * 2 * args.num_maps), numbers(norm ? channel_numbers(args.channels) : 0);
    Junction<F> job{
        args, {}, chunks, args.contrast ? args.num_maps / 2 : args.num_maps, partials.data(), streams(args)};
    if (norm) job.channels = fill(args.gain, args.shift, args.channels, reinterpret_cast<F*>(numbers.data()));
    parallel_for(tasks, args.num_maps * args.batch * args.inner, args.threads,
                 task_for<F, Dtypes..., AnyTypes>(args, kind), &job, 0);
    store_masses(args.mass_a, 0, args.num_maps, args.batch, job.partials, chunks, 2 * args.num_maps);
    store_masses(args.mass_b, 0, args.num_maps, args.batch, job.partials + args.num_maps, chunks,
                 2 * args.num_maps);
}

}  // namespace

void junction(const JunctionArgs& args) {
    const bool wide = any_double(args.first, args.second, args.a, args.b, args.first_scale, args.second_scale,
                                 args.gain, args.shift, args.c_a, args.c_b);
    constexpr DType f32 = DType::f32, bf16 = DType::bf16;
    wide ? run<double>(args)
         : run<float, Types<f32, f32, f32, f32>, Types<f32, f32, f32, bf16>, Types<bf16, f32, bf16, bf16>>(
               args);
}

}  // namespace rf::RF_ISA

// The pull-back of a sum, of one followed by a ReLU, and of one followed by a ReLU of which an operand is a
// BatchNorm.
#include "cpu/channels.h"
#include "cpu/mass.h"

namespace rf::RF_ISA {
namespace {

enum class Kind { sum, relu, norm };

template <class F>
struct Split {
    const SplitArgs& args;
    Channels<F> channels;  // of a norm
    int64_t chunks;        // of one sample
    int64_t groups;        // pairs (P, D), or single rows
    double* partials;      // [B, chunks, a or b, T]
};

// What the readers of the sum say about n elements: P and D of the first and of the second, or null.
template <class F>
struct Readers {
    const F *p, *d, *q, *e;
    F first_p, first_n, second_p, second_n;
};

template <class F>
struct Sum {
    const F *a, *b, *size, *shift;
};

template <class F>
struct Parts {
    F *a_p, *a_d, *b_p, *b_d;
    double *mass_a_p, *mass_a_n, *mass_b_p, *mass_b_n;
};

// Gates are factors, 0 where they are shut: several selections would compete for the mask registers.
template <class F, bool contrast, bool two, Kind kind>
RF_INLINE void split_block(const Readers<F>& in, const Sum<F>& sum, int64_t n, const Parts<F>& out) {
    const F* __restrict p = in.p, * __restrict d = in.d, * __restrict q = in.q, * __restrict e = in.e;
    const F* __restrict left = sum.a, * __restrict right = sum.b;
    const F* __restrict size = sum.size, * __restrict shift = sum.shift;
    F* __restrict a_p = out.a_p, * __restrict a_d = out.a_d, * __restrict b_p = out.b_p, * __restrict b_d = out.b_d;
    const F first_p = in.first_p, first_n = in.first_n, second_p = in.second_p, second_n = in.second_n;
    F sum_a_p = 0, sum_a_n = 0, sum_b_p = 0, sum_b_n = 0;
    RF_SIMD_SUM(sum_a_p, sum_a_n, sum_b_p, sum_b_n)
    for (int64_t i = 0; i < n; ++i) {
        const F z = kind == Kind::norm ? left[i] : left[i] + right[i], b = right[i];
        const F a = kind == Kind::norm ? left[i] - b : left[i];
        const F open = kind == Kind::sum ? F(2) : (z > F(0) ? F(4) : F(0));
        const F open_a = a > F(0) ? open : F(0), open_b = b > F(0) ? open : F(0);
        const F to_a = kind == Kind::norm ? open_a * affine_factor_of(a, size[i], shift[i]) : open_a;
        const F mass_a = open_a * a, mass_b = open_b * b;

        const F of_p = two ? first_p * p[i] + second_p * q[i] : p[i];
        a_p[i] = to_a * of_p;
        b_p[i] = open_b * of_p;
        sum_a_p += mass_a * absolute(of_p);
        sum_b_p += mass_b * absolute(of_p);
        if (contrast) {
            const F of_d = two ? (first_n * d[i] + (first_p - first_n) * p[i]) +
                                     (second_n * e[i] + (second_p - second_n) * q[i])
                               : d[i];
            a_d[i] = to_a * of_d;
            b_d[i] = open_b * of_d;
            const F of_n = absolute(of_p - of_d);
            sum_a_n += mass_a * of_n;
            sum_b_n += mass_b * of_n;
        }
    }
    *out.mass_a_p += static_cast<double>(sum_a_p);
    *out.mass_b_p += static_cast<double>(sum_b_p);
    if (contrast) {
        *out.mass_a_n += static_cast<double>(sum_a_n);
        *out.mass_b_n += static_cast<double>(sum_b_n);
    }
}

template <class F, bool contrast, bool two, Kind kind>
void split_chunk(int64_t index, const void* context, void*) {
    const Split<F>& job = *static_cast<const Split<F>*>(context);
    const SplitArgs& args = job.args;
    const int64_t b = index / job.chunks;
    const int64_t begin = index % job.chunks * kChunk, end = min64(begin + kChunk, args.inner);
    double* sums = job.partials + index * 2 * args.rhs;
    for (int64_t t = 0; t < 2 * args.rhs; ++t) sums[t] = 0;
    F a_in[kBlock], b_in[kBlock], in[4][kBlock], out[4][kBlock];
    for (int64_t start = begin; start < end; start += kBlock) {
        const int64_t n = min64(kBlock, end - start);
        Sum<F> sum{};
        sum.a = load_ahead(args.a, b * args.inner + start, n, a_in);
        sum.b = load_ahead(args.b, b * args.inner + start, n, b_in);
        if (kind == Kind::norm) {
            sum.size = job.channels.size + job.channels.at(start);
            sum.shift = job.channels.shift + job.channels.at(start);
        }
        for (int64_t t = 0; t < job.groups; ++t) {
            const int64_t cell = t * args.batch + b, cell_d = cell + args.rhs / 2 * args.batch;
            const int64_t row = cell * args.inner + start, row_d = cell_d * args.inner + start;
            Readers<F> readers{};
            readers.p = load_ahead(args.first, row, n, in[0]);
            if (contrast) readers.d = load_ahead(args.first, row_d, n, in[1]);
            if (two) {
                readers.first_p = load_one<F>(args.first_scale, cell);
                readers.second_p = load_one<F>(args.second_scale, cell);
                readers.q = load_ahead(args.second, row, n, in[2]);
                if (contrast) {
                    readers.first_n = load_one<F>(args.first_scale, cell_d);
                    readers.second_n = load_one<F>(args.second_scale, cell_d);
                    readers.e = load_ahead(args.second, row_d, n, in[3]);
                }
            }
            Parts<F> to{};
            to.a_p = target(args.c_a, row, out[0]);
            to.b_p = target(args.c_b, row, out[1]);
            to.mass_a_p = sums + t;
            to.mass_b_p = to.mass_a_p + args.rhs;
            if (contrast) {
                to.a_d = target(args.c_a, row_d, out[2]);
                to.b_d = target(args.c_b, row_d, out[3]);
                to.mass_a_n = to.mass_a_p + args.rhs / 2;
                to.mass_b_n = to.mass_b_p + args.rhs / 2;
            }
            split_block<F, contrast, two, kind>(readers, sum, n, to);
            commit(args.c_a, row, n, out[0]);
            commit(args.c_b, row, n, out[1]);
            if (contrast) {
                commit(args.c_a, row_d, n, out[2]);
                commit(args.c_b, row_d, n, out[3]);
            }
        }
    }
}

template <class F, bool contrast, bool two>
Task task_for(Kind kind) {
    return kind == Kind::norm   ? split_chunk<F, contrast, two, Kind::norm>
           : kind == Kind::relu ? split_chunk<F, contrast, two, Kind::relu>
                                : split_chunk<F, contrast, two, Kind::sum>;
}

template <class F>
void run(const SplitArgs& args) {
    const bool norm = args.gain.data != nullptr, two = args.second.data != nullptr;
    const Kind kind = norm ? Kind::norm : args.relu ? Kind::relu : Kind::sum;
    const int64_t chunks = ceil_div(args.inner, kChunk), tasks = args.batch * chunks;
    Partials partials(tasks * 2 * args.rhs), numbers(norm ? channel_numbers(args.channels) : 0);
    Split<F> job{args, {}, chunks, args.contrast ? args.rhs / 2 : args.rhs, partials.data()};
    if (norm) job.channels = fill(args.gain, args.shift, args.channels, reinterpret_cast<F*>(numbers.data()));
    const Task task = args.contrast
                          ? (two ? task_for<F, true, true>(kind) : task_for<F, true, false>(kind))
                          : (two ? task_for<F, false, true>(kind) : task_for<F, false, false>(kind));
    parallel_for(tasks, args.rhs * args.batch * args.inner, args.threads, task, &job, 0);
    store_masses(args.mass_a, 0, args.rhs, args.batch, job.partials, chunks, 2 * args.rhs);
    store_masses(args.mass_b, 0, args.rhs, args.batch, job.partials + args.rhs, chunks, 2 * args.rhs);
}

}  // namespace

void split(const SplitArgs& args) {
    bool wide = false;
    for (const Operand* operand : {&args.first, &args.second, &args.a, &args.b, &args.first_scale,
                                   &args.second_scale, &args.gain, &args.shift})
        wide = wide || (operand->data != nullptr && operand->dtype == DType::f64);
    wide ? run<double>(args) : run<float>(args);
}

}  // namespace rf::RF_ISA

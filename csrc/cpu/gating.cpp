// Parts of a tensor that a gate takes apart: what a product of two of them pulls back, entry by entry, and
// scaled coefficients put back into their place.
#include "cpu/lanes.h"
#include "cpu/mass.h"

namespace rf::RF_ISA {
namespace {

template <class Args>
struct AnyTypes {
    static bool fit(const Args&) { return true; }
    static RF_INLINE Args set(const Args& args) { return args; }
};

// As in an attribution in "mixed": known to the compiler, or every read and write would begin with a test.
struct MixedGate {
    static bool fit(const GatingArgs& args) {
        return args.c.dtype == DType::bf16 && args.c_a.dtype == DType::bf16 &&
               args.c_b.dtype == DType::bf16 && args.a.dtype == DType::f32 && args.b.dtype == DType::f32 &&
               args.x.dtype == DType::f32 && args.factor.dtype == DType::bf16;
    }
    static RF_INLINE GatingArgs set(GatingArgs args) {
        args.c.dtype = args.c_a.dtype = args.c_b.dtype = args.factor.dtype = DType::bf16;
        args.a.dtype = args.b.dtype = args.x.dtype = DType::f32;
        return args;
    }
};

struct BfloatPlace {
    static bool fit(const PlaceArgs& args) {
        return args.c.operand.dtype == DType::bf16 && args.out.operand.dtype == DType::bf16;
    }
    static RF_INLINE PlaceArgs set(PlaceArgs args) {
        args.c.operand.dtype = args.out.operand.dtype = DType::bf16;
        return args;
    }
};

// visit(V{}, i) for [0, width), by vectors of floats as far as they go.
template <class F, class Visit>
RF_INLINE void each(int64_t width, const Visit& visit) {
    int64_t i = 0;
    if constexpr (sizeof(F) == sizeof(float))
        for (; i + kLanes <= width; i += kLanes) visit(Lanes{}, i);
    for (; i < width; ++i) visit(F{}, i);
}

template <class F>
struct Gating {
    const GatingArgs& args;
    int64_t blocks;        // of a row
    int64_t step, chunks;  // blocks of a task, tasks of a sample
    double* partials;      // [B, chunks, a or b, T]
};

template <class F, class Dtypes, bool contrast, bool further>
void gating_rows(int64_t index, const void* context, void*) {
    const auto& job = *static_cast<const Gating<F>*>(context);
    const GatingArgs args = Dtypes::set(job.args);
    const int64_t b = index / job.chunks, begin = index % job.chunks * job.step;
    const int64_t end = min64(begin + job.step, args.rows * job.blocks), maps = args.num_maps;
    const int64_t groups = contrast ? maps / 2 : maps, map_stride = args.batch * args.rows * args.width;
    double* const partials = job.partials + index * 2 * maps;
    for (int64_t i = 0; i < 2 * maps; ++i) partials[i] = 0;
    for (int64_t block = begin; block < end; ++block) {
        const int64_t row = block / job.blocks, start = block % job.blocks * kBlock;
        const int64_t of_a = b * args.of_a[0] + row * args.of_a[1] + start;
        const int64_t of_b = b * args.of_b[0] + row * args.of_b[1] + start;
        const int64_t of_x = b * args.of_x[0] + row * args.of_x[1] + start;
        const int64_t of_factor = (b * args.rows + row) * args.width + start;
        for (int64_t t = 0; t < groups; ++t) {
            const int64_t of_p = t * map_stride + of_factor, of_d = of_p + groups * map_stride;
            Sum<F> a_p, a_n, b_p, b_n;
            each<F>(min64(kBlock, args.width - start), [&](auto tag, int64_t i) {
                using V = decltype(tag);
                const V a = read<V>(args.a, of_a + i), other = read<V>(args.b, of_b + i), zero{};
                const V open = a * other > zero ? zero + F(2) : zero;
                V to_a = open * magnitude<V>(other);
                const V to_b = open * magnitude<V>(a), weight_b = magnitude<V>(other) * to_b;
                V weight_a = weight_b;
                if constexpr (further) {
                    to_a *= read<V>(args.factor, of_factor + i);
                    weight_a = magnitude<V>(read<V>(args.x, of_x + i)) * magnitude<V>(to_a);
                }
                const V p = read<V>(args.c, of_p + i);
                write<V>(args.c_a, of_p + i, to_a * p, false);
                write<V>(args.c_b, of_p + i, to_b * p, false);
                a_p.add(weight_a * magnitude<V>(p));
                b_p.add(weight_b * magnitude<V>(p));
                if (contrast) {
                    const V d = read<V>(args.c, of_d + i), of_n = magnitude<V>(p - d);
                    write<V>(args.c_a, of_d + i, to_a * d, false);
                    write<V>(args.c_b, of_d + i, to_b * d, false);
                    a_n.add(weight_a * of_n);
                    b_n.add(weight_b * of_n);
                }
            });
            partials[t] += a_p.value();
            partials[maps + t] += b_p.value();
            if (contrast) {
                partials[t + groups] += a_n.value();
                partials[maps + t + groups] += b_n.value();
            }
        }
    }
}

template <class F, class Dtypes>
void run_gating(const GatingArgs& args) {
    const int64_t blocks = ceil_div(args.width, kBlock), step = rows_of_task(min64(args.width, kBlock));
    const int64_t chunks = ceil_div(args.rows * blocks, step);
    Partials partials(args.batch * chunks * 2 * args.num_maps);
    const Gating<F> job{args, blocks, step, chunks, partials.data()};
    const bool further = args.factor.data != nullptr;
    const Task task =
        further
            ? (args.contrast ? gating_rows<F, Dtypes, true, true> : gating_rows<F, Dtypes, false, true>)
            : (args.contrast ? gating_rows<F, Dtypes, true, false> : gating_rows<F, Dtypes, false, false>);
    parallel_for(args.batch * chunks, args.num_maps * args.batch * args.rows * args.width, args.threads, task,
                 &job, 0);
    store_masses(args.mass_a, 0, args.num_maps, args.batch, job.partials, chunks, 2 * args.num_maps);
    store_masses(args.mass_b, 0, args.num_maps, args.batch, job.partials + args.num_maps, chunks,
                 2 * args.num_maps);
}

struct Place {
    const PlaceArgs& args;
    int64_t step, chunks;
};

template <class F, class Dtypes, bool contrast>
void place_rows(int64_t index, const void* context, void*) {
    const Place& job = *static_cast<const Place*>(context);
    const PlaceArgs args = Dtypes::set(job.args);
    const int64_t b = index / job.chunks, begin = index % job.chunks * job.step;
    const int64_t end = min64(begin + job.step, args.rows);
    const int64_t groups = contrast ? args.num_maps / 2 : args.num_maps;
    for (int64_t t = 0; t < groups; ++t) {
        const F scale_p = load_one<F>(args.scale, t * args.batch + b);
        const F scale_n = contrast ? load_one<F>(args.scale, (t + groups) * args.batch + b) : F(0);
        for (int64_t n = begin; n < end; ++n)
            for (int64_t h = 0; h < args.heads; ++h) {
                const int64_t of_p = offset(args.c, t, b, h, n), of_d = offset(args.c, t + groups, b, h, n);
                const int64_t to_p = offset(args.out, t, b, h, n),
                              to_d = offset(args.out, t + groups, b, h, n);
                each<F>(args.width, [&](auto tag, int64_t i) {
                    using V = decltype(tag);
                    const V p = read<V>(args.c.operand, of_p + i), scaled = scale_p * p;
                    write<V>(args.out.operand, to_p + i, scaled, false);
                    if (contrast) {  // where N is zero it stays so, to the last bit
                        const V d = read<V>(args.c.operand, of_d + i);
                        const V both = scale_n * d + (scale_p - scale_n) * p;
                        write<V>(args.out.operand, to_d + i, d == p ? scaled : both, false);
                    }
                });
            }
    }
}

template <class F, class Dtypes>
void run_place(const PlaceArgs& args) {
    const int64_t step = rows_of_task(args.heads * args.width);
    const Place job{args, step, ceil_div(args.rows, step)};
    const Task task = args.contrast ? place_rows<F, Dtypes, true> : place_rows<F, Dtypes, false>;
    parallel_for(args.batch * job.chunks, args.num_maps * args.batch * args.heads * args.rows * args.width,
                 args.threads, task, &job, 0);
}

}  // namespace

void gating_pullback(const GatingArgs& args) {
    if (any_double(args.c, args.a, args.b, args.x, args.factor))
        run_gating<double, AnyTypes<GatingArgs>>(args);
    else if (MixedGate::fit(args))
        run_gating<float, MixedGate>(args);
    else
        run_gating<float, AnyTypes<GatingArgs>>(args);
}

void rescale_piece(const PlaceArgs& args) {
    if (any_double(args.c.operand, args.out.operand, args.scale))
        run_place<double, AnyTypes<PlaceArgs>>(args);
    else if (BfloatPlace::fit(args))
        run_place<float, BfloatPlace>(args);
    else
        run_place<float, AnyTypes<PlaceArgs>>(args);
}

}  // namespace rf::RF_ISA

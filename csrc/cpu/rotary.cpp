// Rotary embeddings, y = w x + (v x) with partners exchanged, and what absLRP pulls back through them.
#include "cpu/lanes.h"
#include "cpu/mass.h"

namespace rf::RF_ISA {
namespace {

// The dtypes of coefficients (of both sides) and of the map's operand and result, where the compiler knows
// them: otherwise every read and write begins with a test.
struct AnyTypes {
    static bool fit(const RotaryArgs&) { return true; }
    static RF_INLINE RotaryArgs set(const RotaryArgs& args) { return args; }
};

template <DType coefficient, DType value>
struct Types {
    static bool fit(const RotaryArgs& args) {
        return args.c.operand.dtype == coefficient && args.out.operand.dtype == coefficient &&
               args.x.operand.dtype == value && args.y.operand.dtype == value &&
               args.stay.dtype == DType::f32 && args.cross.dtype == DType::f32;
    }
    static RF_INLINE RotaryArgs set(RotaryArgs args) {
        args.c.operand.dtype = args.out.operand.dtype = coefficient;
        args.x.operand.dtype = args.y.operand.dtype = value;
        args.stay.dtype = args.cross.dtype = DType::f32;
        return args;
    }
};

template <class F>
struct Rotary {
    const RotaryArgs& args;
    int64_t step, chunks;  // rows of a task, tasks of a sample
    int64_t groups;        // pairs (P, D), or single rows
    double* partials;      // [B, chunks, kept, arriving or leaving, T]
    double* scales;        // [kept or turned, T, B]; absent while masses are summed
};

// visit(V{}, i, where the partner of i is) for all elements of a row, by vectors as far as they go. A vector
// of neighbours holds the partners of its elements itself.
template <class F, bool neighbours, class Visit>
RF_INLINE void each(int64_t width, int64_t pair, const Visit& visit) {
    constexpr bool vectors = sizeof(F) == sizeof(float);
    if constexpr (neighbours) {
        int64_t i = 0;
        if constexpr (vectors)
            for (; i + kLanes <= width; i += kLanes) visit(Lanes{}, i, i);
        for (; i < width; ++i) visit(F{}, i, i ^ 1);
    } else {
        for (int64_t begin = 0; begin < width; begin += 2 * pair)
            for (int64_t half = 0; half < 2; ++half) {
                const int64_t from = begin + half * pair, to = begin + (1 - half) * pair;
                int64_t i = 0;
                if constexpr (vectors)
                    for (; i + kLanes <= pair; i += kLanes) visit(Lanes{}, from + i, to + i);
                for (; i < pair; ++i) visit(F{}, from + i, to + i);
            }
    }
}

// Of the partners of V's elements: `here` is what V itself has, `there` reads what is elsewhere.
template <class V, bool neighbours, class Read>
RF_INLINE V partners([[maybe_unused]] V here, [[maybe_unused]] const Read& there) {
    if constexpr (neighbours && sizeof(V) == sizeof(Lanes))
        return __builtin_shufflevector(here, here, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    else
        return there();
}

template <class F, class Dtypes, bool neighbours>
void forward_rows(int64_t index, const void* context, void*) {
    const auto& job = *static_cast<const Rotary<F>*>(context);
    const RotaryArgs args = Dtypes::set(job.args);
    const int64_t b = index / job.chunks, begin = index % job.chunks * job.step;
    const int64_t end = min64(begin + job.step, args.rows), turned = args.rows - args.first;
    for (int64_t n = begin; n < end; ++n)
        for (int64_t h = 0; h < args.heads; ++h) {
            const int64_t from = offset(args.x, 0, b, h, n), to = offset(args.y, 0, b, h, n);
            const int64_t weight = ((args.weight_heads > 1 ? h : 0) * turned + n - args.first) * args.width;
            const bool kept = n < args.first;
            each<F, neighbours>(args.width, args.pair, [&](auto tag, int64_t i, int64_t other) {
                using V = decltype(tag);
                const V x = read<V>(args.x.operand, from + i);
                if (kept) return write<V>(args.y.operand, to + i, x, false);
                const V cross = partners<V, neighbours>(read<V>(args.cross, weight + i) * x, [&] {
                    return read<V>(args.cross, weight + other) * read<V>(args.x.operand, from + other);
                });
                write<V>(args.y.operand, to + i, read<V>(args.stay, weight + i) * x + cross, false);
            });
        }
}

// What a row sends back: a weight w is |w| + sign(x) w there.
template <class F, class Dtypes, bool contrast, bool neighbours, bool writes>
void pullback_rows(int64_t index, const void* context, void*) {
    const auto& job = *static_cast<const Rotary<F>*>(context);
    const RotaryArgs args = Dtypes::set(job.args);
    const int64_t b = index / job.chunks, begin = index % job.chunks * job.step;
    const int64_t end = min64(begin + job.step, args.rows), turned = args.rows - args.first;
    const int64_t maps = args.num_maps, groups = job.groups;
    double* const partials = job.partials + index * 3 * maps;
    if (!writes)
        for (int64_t i = 0; i < 3 * maps; ++i) partials[i] = 0;
    for (int64_t n = begin; n < end; ++n)
        for (int64_t t = 0; t < groups; ++t) {
            const bool kept = n < args.first;
            F scale_p = 0, scale_n = 0;
            if (writes) {
                const double* const scales = job.scales + (kept ? 0 : maps * args.batch) + b;
                scale_p = static_cast<F>(scales[t * args.batch]);
                if (contrast) scale_n = static_cast<F>(scales[(t + groups) * args.batch]);
            }
            Sum<F> above_p, above_n, below_p, below_n;
            for (int64_t h = 0; h < args.heads; ++h) {
                const int64_t of_p = offset(args.c, t, b, h, n), of_d = offset(args.c, t + groups, b, h, n);
                const int64_t to_p = offset(args.out, t, b, h, n),
                              to_d = offset(args.out, t + groups, b, h, n);
                const int64_t of_x = offset(args.x, 0, b, h, n), of_y = offset(args.y, 0, b, h, n);
                const int64_t weight =
                    ((args.weight_heads > 1 ? h : 0) * turned + n - args.first) * args.width;
                const bool measured = !writes && args.y.operand.data != nullptr;
                each<F, neighbours>(args.width, args.pair, [&](auto tag, int64_t i, int64_t other) {
                    using V = decltype(tag);
                    V p = read<V>(args.c.operand, of_p + i), d{};
                    if (contrast) d = read<V>(args.c.operand, of_d + i);
                    if (measured) {
                        const V y = magnitude<V>(read<V>(args.y.operand, of_y + i));
                        above_p.add(y * magnitude<V>(p));
                        if (contrast) above_n.add(y * magnitude<V>(p - d));
                    }
                    if (!kept) {
                        const V x = read<V>(args.x.operand, of_x + i), zero{};
                        const V one = zero + F(1), sign = x > zero ? one : (x < zero ? -one : zero);
                        const V stay = read<V>(args.stay, weight + i),
                                cross = read<V>(args.cross, weight + i);
                        const V of_own = magnitude<V>(stay) + sign * stay;
                        const V of_other = magnitude<V>(cross) + sign * cross;
                        const V q =
                            partners<V, neighbours>(p, [&] { return read<V>(args.c.operand, of_p + other); });
                        const V own = p;
                        p = of_own * own + of_other * q;
                        if (contrast) {
                            const V e = partners<V, neighbours>(
                                d, [&] { return read<V>(args.c.operand, of_d + other); });
                            // The compiler may fuse another product with the sum than it did for P.
                            const auto same = (d == own) & (e == q);
                            const V turned_d = of_own * d + of_other * e;
                            d = same ? p : turned_d;
                        }
                        if (!writes) {
                            below_p.add(magnitude<V>(x) * magnitude<V>(p));
                            if (contrast) below_n.add(magnitude<V>(x) * magnitude<V>(p - d));
                        }
                    }
                    if (writes) {
                        const V scaled = scale_p * p;
                        write<V>(args.out.operand, to_p + i, scaled, false);
                        if (contrast) {  // where N is zero it stays so, to the last bit
                            const V both = scale_n * d + (scale_p - scale_n) * p;
                            write<V>(args.out.operand, to_d + i, d == p ? scaled : both, false);
                        }
                    }
                });
            }
            if (writes) continue;
            double* const above = partials + (kept ? 0 : maps);
            above[t] += above_p.value();
            partials[2 * maps + t] += below_p.value();
            if (contrast) {
                above[t + groups] += above_n.value();
                partials[2 * maps + t + groups] += below_n.value();
            }
        }
}

// What kept and turned rows are multiplied by, and the mass that all of them have then.
template <class F>
void share_mass(const Rotary<F>& job) {
    const RotaryArgs& args = job.args;
    const int64_t cells = args.num_maps * args.batch;
    for (int64_t cell = 0; cell < cells; ++cell) {
        const int64_t t = cell / args.batch, b = cell % args.batch;
        double sums[3] = {0, 0, 0};
        for (int64_t chunk = b * job.chunks; chunk < (b + 1) * job.chunks; ++chunk)
            for (int64_t k = 0; k < 3; ++k) sums[k] += job.partials[(chunk * 3 + k) * args.num_maps + t];
        const double target = static_cast<double>(load_one<F>(args.target, cell));
        const double kept = sums[0], below = sums[2];
        // Without y all rows are turned: what arrives is what they stand for.
        const bool whole = args.y.operand.data == nullptr;
        const double above = whole ? target : sums[1], all = kept + above;
        const double scale = whole ? 1 : all == 0 ? 0 : target / all;
        const double arrives = below == 0 ? 0 : scale * above;
        job.scales[cell] = scale;
        job.scales[cells + cell] = below == 0 ? 0 : arrives / below;
        store_one(args.mass, cell, scale * kept + arrives);
    }
}

template <class F>
Rotary<F> job_of(const RotaryArgs& args, int64_t maps) {
    const int64_t step = rows_of_task(args.heads * args.width);
    return {args, step, ceil_div(args.rows, step), maps, nullptr, nullptr};
}

template <class F, class Dtypes>
Task forward_of(const RotaryArgs& args) {
    return args.pair == 1 ? forward_rows<F, Dtypes, true> : forward_rows<F, Dtypes, false>;
}

template <class F, class Dtypes, bool contrast, bool neighbours>
void pull(Rotary<F>& job) {
    const RotaryArgs& args = job.args;
    const int64_t tasks = args.batch * job.chunks, cells = args.num_maps * args.batch;
    const int64_t work = cells * args.heads * args.rows * args.width;
    Partials partials(tasks * 3 * args.num_maps), scales(2 * cells);
    job.partials = partials.data();
    job.scales = scales.data();
    parallel_for(tasks, work, args.threads, pullback_rows<F, Dtypes, contrast, neighbours, false>, &job, 0);
    share_mass(job);
    parallel_for(tasks, work, args.threads, pullback_rows<F, Dtypes, contrast, neighbours, true>, &job, 0);
}

template <class F, class Dtypes>
void pullback(const RotaryArgs& args) {
    auto job = job_of<F>(args, args.contrast ? args.num_maps / 2 : args.num_maps);
    if (args.pair == 1)
        args.contrast ? pull<F, Dtypes, true, true>(job) : pull<F, Dtypes, false, true>(job);
    else
        args.contrast ? pull<F, Dtypes, true, false>(job) : pull<F, Dtypes, false, false>(job);
}

using Mixed = Types<DType::bf16, DType::f32>;
using Single = Types<DType::f32, DType::f32>;

}  // namespace

void rotary(const RotaryArgs& args) {
    const bool wide = any_double(args.x.operand, args.stay, args.cross, args.y.operand);
    const auto run = [&](auto job, Task task) {
        parallel_for(args.batch * job.chunks, args.batch * args.heads * args.rows * args.width, args.threads,
                     task, &job, 0);
    };
    if (wide)
        run(job_of<double>(args, 0), forward_of<double, AnyTypes>(args));
    else if (Single::fit(args))  // what is absent counts as float
        run(job_of<float>(args, 0), forward_of<float, Single>(args));
    else
        run(job_of<float>(args, 0), forward_of<float, AnyTypes>(args));
}

void rotary_pullback(const RotaryArgs& args) {
    if (any_double(args.c.operand, args.x.operand, args.y.operand, args.stay, args.cross, args.target))
        pullback<double, AnyTypes>(args);
    else if (Mixed::fit(args))
        pullback<float, Mixed>(args);
    else if (Single::fit(args))
        pullback<float, Single>(args);
    else
        pullback<float, AnyTypes>(args);
}

}  // namespace rf::RF_ISA

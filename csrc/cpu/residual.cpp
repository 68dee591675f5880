// Residual quantization: a task takes some rows through all levels, while what is left of them stays in cache.
//
// One task: one or a few runs of 256 rows, or a piece of one where there are few. Per level it searches its rows in the
// blocks of the screening pass (screen.h) and takes their codes off, so that a codebook comes from memory once per
// level and task. Read: x once. Written: quantized, indices and one error per level and run, each once.
// Few rows without preparations are searched level by level by all threads together.

#include "residual.h"

#include <atomic>
#include <cmath>

#include "code_sums.h"
#include "residual_rows.h"
#include "screen.h"
#include "unprepared.h"

namespace vqops {
namespace {

// One error per row, level after level, of some rows of one run; and their sums.
struct RunErrors {
    static int64_t size(const ResidualInputs& in) { return in.Q() * kRun; }

    static void add(const ResidualInputs& in, const double* errors, int64_t count, double* sums) {
        for (int64_t l = 0; l < in.running; l++)
            for (int64_t i = 0; i < count; i++) sums[l] += errors[l * kRun + i];
    }
};

// How the rows are cut into tasks.
struct Tasks {
    Tasks(const ResidualInputs& in, int64_t threads) : runs((in.N + kRun - 1) / kRun) {
        const int64_t tile = instructions().tile, wanted = kTasksPerThread * threads;
        const int64_t pieces = in.H * runs >= wanted ? 1 : (wanted + in.H * runs - 1) / std::max<int64_t>(in.H * runs, 1);
        rows = pieces == 1 ? kRun : std::min<int64_t>(kRun, round_up((kRun + pieces - 1) / pieces, tile));
        per_run = (kRun + rows - 1) / rows;
    }

    static constexpr int64_t kTasksPerThread = 4;
    int64_t runs;     // of a head
    int64_t per_run;  // tasks of a run
    int64_t rows;     // of a task
};

// What a task needs of its thread.
template <class T>
class Worker {
public:
    Worker(const ResidualInputs& in, const ResidualResult& result, int64_t rows)
        : in_(in), result_(result), left_(in, rows), shape_{1, rows, 0, in.D, in.cosine}, x_(left_.as_rows()),
          codebook_(in.levels[0].codebook), mask_(left_.mask()), found_{left_.indices(), 1, nullptr, nullptr},
          block_(rows_of_block(in.D, rows)), screen_(shape_, x_, codebook_, mask_, found_, block_) {}

    // Rows [begin, end) of head h through all levels; errors as RunErrors has them.
    void run(int64_t h, int64_t begin, int64_t end, double* errors) {
        left_.read(h, begin, end);
        for (int64_t l = 0; l < in_.running; l++) {
            const Level& level = in_.levels[l];
            shape_.K = level.K;
            codebook_ = level.codebook.from(h, 0);
            const char* memory = static_cast<const char*>(level.packed) + h * Packed::bytes(level.K, in_.D);
            const Packed packed(memory, level.K, in_.D);
            for (int64_t i = 0; i < end - begin; i += block_)
                screen_.run(0, i, std::min(i + block_, end - begin), packed);
            left_.take_off(codebook_, l, result_.indices, errors + l * kRun);
        }
        left_.write(result_);
    }

private:
    const ResidualInputs& in_;
    const ResidualResult& result_;
    LevelRows<T> left_;
    // As the screening pass sees a level: K and the codes change.
    SearchShape shape_;
    Rows x_, codebook_;
    RowMask mask_;
    SearchResult found_;
    const int64_t block_;
    Screen screen_;
};

void write_errors(const ResidualInputs& in, const std::vector<double>& sums, int64_t runs, void* error) {
    for (int64_t h = 0; h < in.H; h++)
        for (int64_t l = 0; l < in.Q(); l++) {
            double sum = 0;
            for (int64_t r = 0; r < runs; r++) sum += sums[(h * runs + r) * in.Q() + l];
            write_value(error, in.real(), h * in.Q() + l, sum);
        }
}

template <class T>
void many(const ResidualInputs& in, const ResidualResult& result, const Parallel& parallel) {
    const Tasks cut(in, parallel.threads);
    const int64_t tasks = in.H * cut.runs * cut.per_run, Q = in.Q();
    std::vector<double> sums(in.H * cut.runs * Q);
    // Of runs that several threads share, which are few.
    std::vector<double> shared(cut.per_run > 1 ? in.H * cut.runs * RunErrors::size(in) : 0);
    std::atomic<int64_t> next{0};
    parallel.over(std::min<int64_t>(parallel.threads, tasks), [&](int64_t, int64_t) {
        const DefaultFloatMode mode;
        Worker<T> worker(in, result, cut.rows);
        std::vector<double> own(cut.per_run > 1 ? 0 : RunErrors::size(in));
        for (int64_t task; (task = next++) < tasks;) {
            const int64_t run = task / cut.per_run, h = run / cut.runs, first = run % cut.runs * kRun;
            const int64_t offset = task % cut.per_run * cut.rows, last = std::min(first + kRun, in.N);
            const int64_t begin = first + offset, end = std::min(begin + cut.rows, last);
            if (begin >= end) continue;
            double* errors = cut.per_run > 1 ? &shared[run * RunErrors::size(in)] : own.data();
            worker.run(h, begin, end, errors + offset);
            if (cut.per_run == 1) RunErrors::add(in, errors, end - begin, &sums[run * Q]);
        }
    });
    for (int64_t run = 0; run < in.H * cut.runs && cut.per_run > 1; run++) {
        const int64_t count = std::min<int64_t>(kRun, in.N - run % cut.runs * kRun);
        RunErrors::add(in, &shared[run * RunErrors::size(in)], count, &sums[run * Q]);
    }
    write_errors(in, sums, cut.runs, result.error);
}

// At most kUnpreparedRows.
template <class T>
void few(const ResidualInputs& in, const ResidualResult& result, const Parallel& parallel) {
    static_assert(kUnpreparedRows <= kRun);
    const DefaultFloatMode mode;
    LevelRows<T> left(in, in.N);
    std::vector<double> errors(RunErrors::size(in)), sums(in.H * in.Q());
    for (int64_t h = 0; h < in.H; h++) {
        left.read(h, 0, in.N);
        for (int64_t l = 0; l < in.running; l++) {
            const Level& level = in.levels[l];
            const Rows codebook = level.codebook.from(h, 0);
            const char* memory = static_cast<const char*>(level.packed);
            if (memory) memory += h * Packed::bytes(level.K, in.D);
            search({1, in.N, level.K, in.D, in.cosine}, left.as_rows(), codebook, left.mask(), memory,
                   {left.indices(), 1, nullptr, nullptr}, parallel);
            left.take_off(codebook, l, result.indices, &errors[l * kRun]);
        }
        left.write(result);
        RunErrors::add(in, errors.data(), in.N, &sums[h * in.Q()]);
    }
    write_errors(in, sums, 1, result.error);
}

template <class T>
void run(const ResidualInputs& in, const ResidualResult& result, const Parallel& parallel) {
    if (in.running < in.Q()) std::fill_n(result.indices, in.H * in.N * in.Q(), -1);
    if (in.N <= kUnpreparedRows) few<T>(in, result, parallel);
    else many<T>(in, result, parallel);
}

}  // namespace

void quantize_levels(const ResidualInputs& in, const ResidualResult& result, const Parallel& parallel) {
    if (in.real() == DType::float64) run<double>(in, result, parallel);
    else run<float>(in, result, parallel);
}

namespace {

template <class T>
void sum(const ResidualInputs& in, const int64_t* indices, int64_t* counts, float* sums, const Parallel& parallel) {
    for (int64_t h = 0; h < in.H; h++) {
        Rest<T> rest(in.x.from(h, 0), in.real(), in.N, in.D);
        for (int64_t l = 0; l < in.Q(); l++) {
            const int64_t K = in.levels[l].K;
            const Indices chosen = {indices + h * in.N * in.Q() + l, 0, in.Q(), K};
            sum_codes({1, in.N, K, in.D, in.units}, rest.rows(), chosen, nullptr, {counts, sums}, parallel);
            if (l + 1 < in.running) rest.take_off(in.levels[l].codebook.from(h, 0), chosen, parallel);
            counts += K, sums += K * in.D;
        }
    }
}

}  // namespace

void sum_levels(const ResidualInputs& in, const int64_t* indices, int64_t* counts, float* sums,
                const Parallel& parallel) {
    if (in.real() == DType::float64) sum<double>(in, indices, counts, sums, parallel);
    else sum<float>(in, indices, counts, sums, parallel);
}

}  // namespace vqops

// Residual quantization: a task takes some rows through all levels, while what is left of them stays in cache.
//
// One task: at most eight runs of 256 rows, or a piece of one where there are few. Per level it searches its rows in the
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

constexpr int64_t kTasksPerThread = 4;   // so that threads end together
constexpr int64_t kRunsPerTask = 8;      // a codebook comes from memory once for all rows of a task: 2 to 5 % over one
constexpr int64_t kTaskBytes = 2 << 20;  // of what is left of them

// How the rows of a head are cut: in groups of runs, and a group in tasks.
struct Cut {
    Cut(const ResidualInputs& in, int64_t threads) {
        const int64_t wanted = kTasksPerThread * threads, runs = in.H * ((in.N + kRun - 1) / kRun);
        const int64_t fitting = kTaskBytes / (kRun * in.D * bytes_of(in.real()));
        group = kRun * std::clamp<int64_t>(std::min(fitting, runs / wanted), 1, kRunsPerTask);
        groups = (in.N + group - 1) / group;
        const int64_t pieces = (wanted + runs - 1) / std::max<int64_t>(runs, 1);
        task = std::min(group, round_up((group + pieces - 1) / pieces, instructions().tile));
        per_group = (group + task - 1) / task;
    }

    int64_t group, task;        // rows of each
    int64_t groups, per_group;  // groups of a head, tasks of a group
};

// The errors of rows, [Q, group], and their sums.
class Errors {
public:
    Errors(const ResidualInputs& in, int64_t group)
        : in_(in), group_(group), runs_((in.N + kRun - 1) / kRun), sums_(in.H * runs_ * in.Q()) {}

    int64_t size() const { return in_.Q() * group_; }

    // Those of rows n to n + count, of a group that begins with row n.
    void add(int64_t h, int64_t n, int64_t count, const double* errors) {
        for (int64_t first = 0; first < count; first += kRun)
            for (int64_t l = 0; l < in_.running; l++) {
                double sum = 0;
                for (int64_t i = first; i < std::min(first + kRun, count); i++) sum += errors[l * group_ + i];
                sums_[(h * runs_ + (n + first) / kRun) * in_.Q() + l] = sum;
            }
    }

    void write(void* error) const {
        for (int64_t h = 0; h < in_.H; h++)
            for (int64_t l = 0; l < in_.Q(); l++) {
                double sum = 0;
                for (int64_t r = 0; r < runs_; r++) sum += sums_[(h * runs_ + r) * in_.Q() + l];
                write_value(error, in_.real(), h * in_.Q() + l, sum);
            }
    }

private:
    const ResidualInputs& in_;
    const int64_t group_, runs_;
    std::vector<double> sums_;
};

typedef std::vector<std::unique_ptr<PreciseCodebook>> PreciseLevels;

// What a task needs of its thread.
template <class T>
class Worker {
public:
    // `precise`: of the levels, or none.
    Worker(const ResidualInputs& in, const ResidualResult& result, int64_t rows, const PreciseLevels& precise)
        : in_(in), left_(in, result, rows), shape_{1, rows, 0, in.D, in.cosine}, x_(left_.as_rows()),
          codebook_(in.levels[0].codebook), mask_(left_.mask()), found_{left_.indices(), 1, nullptr, nullptr},
          most_(rows_of_block(instructions(), in.D, rows)),
          screen_(instructions(), shape_, x_, codebook_, mask_, found_, most_), precise_(precise) {}

    // Rows [begin, end) of head h through all levels; the errors of a level are `stride` from those of the next.
    void run(int64_t h, int64_t begin, int64_t end, double* errors, int64_t stride) {
        const int64_t count = end - begin, blocks = (count + most_ - 1) / most_;
        const int64_t block = std::min(most_, round_up((count + blocks - 1) / blocks, instructions().tile));
        left_.read(h, begin, end);
        for (int64_t l = 0; l < in_.running; l++) {
            const Level& level = in_.levels[l];
            shape_.K = level.K;
            codebook_ = level.codebook.from(h, 0);
            const char* memory = static_cast<const char*>(level.packed) + h * Packed::bytes(level.K, in_.D);
            const Packed packed(memory, level.K, in_.D);
            for (int64_t i = 0; i < count; i += block)
                screen_.run(0, i, std::min(i + block, count), packed, precise_[l].get(), h);
            left_.take_off(codebook_, l, errors + l * stride);
        }
        left_.write();
    }

private:
    const ResidualInputs& in_;
    LevelRows<T> left_;
    // As the screening pass sees a level: K and the codes change.
    SearchShape shape_;
    Rows x_, codebook_;
    RowMask mask_;
    SearchResult found_;
    const int64_t most_;
    Screen screen_;
    const PreciseLevels& precise_;
};

template <class T>
void many(const ResidualInputs& in, const ResidualResult& result, const Parallel& parallel) {
    const Cut cut(in, parallel.threads);
    const int64_t groups = in.H * cut.groups, tasks = groups * cut.per_group;
    const bool shared = cut.per_group > 1;
    Errors sums(in, cut.group);
    std::vector<double> of_all(shared ? groups * sums.size() : 0);  // groups that threads share are few
    const auto rows_from = [&](int64_t n) { return std::min(cut.group, in.N - n); };
    PreciseLevels precise;
    for (int64_t l = 0; l < in.running; l++)
        precise.push_back(precise_codebook({in.H, in.N, in.levels[l].K, in.D, in.cosine}, in.levels[l].codebook));
    std::atomic<int64_t> next{0};
    parallel.over(std::min<int64_t>(parallel.threads, tasks), [&](int64_t, int64_t) {
        const DefaultFloatMode mode;
        Worker<T> worker(in, result, cut.task, precise);
        std::vector<double> own(shared ? 0 : sums.size());
        for (int64_t number; (number = next++) < tasks;) {
            const int64_t group = number / cut.per_group, h = group / cut.groups, n = group % cut.groups * cut.group;
            const int64_t begin = number % cut.per_group * cut.task, end = std::min(begin + cut.task, rows_from(n));
            if (begin >= end) continue;
            double* errors = shared ? &of_all[group * sums.size()] : own.data();
            worker.run(h, n + begin, n + end, errors + begin, cut.group);
            if (!shared) sums.add(h, n, end, errors);
        }
    });
    for (int64_t group = 0; shared && group < groups; group++) {
        const int64_t n = group % cut.groups * cut.group;
        sums.add(group / cut.groups, n, rows_from(n), &of_all[group * sums.size()]);
    }
    sums.write(result.error);
}

// At most kUnpreparedRows.
template <class T>
void few(const ResidualInputs& in, const ResidualResult& result, const Parallel& parallel) {
    static_assert(kUnpreparedRows <= kRun);
    LevelRows<T> left(in, result, in.N);
    Errors sums(in, kRun);
    std::vector<double> errors(sums.size());
    for (int64_t h = 0; h < in.H; h++) {
        left.read(h, 0, in.N);
        for (int64_t l = 0; l < in.running; l++) {
            const Level& level = in.levels[l];
            const Rows codebook = level.codebook.from(h, 0);
            const char* memory = static_cast<const char*>(level.packed);
            if (memory) memory += h * Packed::bytes(level.K, in.D);
            search({1, in.N, level.K, in.D, in.cosine}, left.as_rows(), codebook, left.mask(), memory,
                   {left.indices(), 1, nullptr, nullptr}, parallel);
            left.take_off(codebook, l, &errors[l * kRun]);
        }
        left.write();
        sums.add(h, 0, in.N, errors.data());
    }
    sums.write(result.error);
}

template <class T>
void run(const ResidualInputs& in, const ResidualResult& result, const Parallel& parallel) {
    if (in.running < in.Q()) std::fill_n(result.indices, in.H * in.N * in.Q(), -1);
    if (in.N <= kUnpreparedRows) few<T>(in, result, parallel);
    else many<T>(in, result, parallel);
}

}  // namespace

void quantize_levels(const ResidualInputs& in, const ResidualResult& result, const Parallel& parallel) {
    const DefaultFloatMode mode;
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

// The kernels that exist once per instruction set (sets/), and the choice between them at run time.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__)
#define VQOPS_AMX  // the only system that is asked for the permission to use tiles
#endif

namespace vqops {

constexpr int kMostTile = 32;      // rows of the highest tile
constexpr int kMostCodes = 32;     // codes of the widest
constexpr double kUnit = 0x1p-24;  // rounding of float32

// Receiver of the codes that the bound of a row does not exclude, in a search without preparation.
struct Offer {
    void* lists;
    void (*candidate)(void* lists, int64_t row, int64_t code, float lower);
};

// A block of rows with the codes that their bounds leave open (candidates.h), as the screening pass fills it.
struct OpenCodes {
    float* threshold;     // [rows] least upper bound of a row so far; -inf takes no more candidates, NaN is no row
    const float* rest;    // [rows] from the lower to the upper bound, whatever the code
    int32_t* count;       // [rows]
    int32_t* code;        // [rows, room]
    float* lower;         // [rows, room]
    int32_t capacity;     // a list that reached it is given to `full`
    int32_t room;         // at least capacity + kMostCodes
    int32_t codes;        // lanes beyond are padding
    void* owner;
    void (*full)(void* owner, int64_t row);
    // Takes each candidate instead where several nearest codes are wanted, else null.
    void (*candidate)(void* owner, int64_t row, int64_t code, float lower, float upper);
    void (*too_many)(void* owner, int64_t row);  // of a row that is sure to have more than a list holds
    int32_t wanted;  // nearest codes
    void* work;      // screen_bytes() of the thread's own, at a whole cache line
};

// The packed codebook, as the screening pass reads it.
struct Panels {
    const void* words;   // [count] panels, as the set lays them out
    const float* start;  // the sums' first values
    const float* slack;  // from the lower to the upper bound, of a code alone
    int64_t count, D;
};

// A block of rows with the codes that may have their largest key, as the screening pass meets them. In the units of a
// row, |X| for cosine, else those of the codes.
struct Draws {
    const float* offset;     // [rows] |X|^2 - 2 rest from below, for cosine X.m + rest from above
    const float* step;       // [rows] of the bound of the noise (noise.h),
    const float* most;       // [rows]
    const uint64_t* number;  // [rows] the rows' numbers, for the noise
    float* threshold;        // [rows] below the largest key so far; NaN is no row
    uint64_t key;
    uint32_t head;
    bool cosine;
    float* noise;  // [rows, 4 lanes], for the pass alone
    void* owner;
    // Looks at the code in a place, which may raise the row's threshold.
    void (*consider)(void* owner, int64_t row, int64_t place);
};

// Rows or codes on their way into a block or a panel: scale (vector - centre).
struct Given {
    const float* const* vectors;  // [count] of D values
    int64_t count, D;
    const float* centre;  // [D]
    float scale;
};

// Rows as they lie in memory, to be added up by code: those of codes [first, first + count) are added to sums [count, D].
// With `target` to target[code - first], and after each 256th row of a code `fold` is called with it (code_sums.h).
struct RowSums {
    const int64_t* indices;
    int64_t index_stride;
    const float* rows;
    int64_t row_stride, N, D, first, count;
    float* sums;
    float* const* target;  // null: no code has more than a run
    uint8_t* length;  // rows so far, modulo 256
    void* owner;
    void (*fold)(void* owner, int64_t code);
};

// The averages of the codes of one head (ema.h).
struct EmaHead {
    int64_t K, D;
    float decay, eps;
    bool cosine;
    // All contiguous: size [K], average [K, D], codes [K, D] (null: left alone), sums [K, D]; counts [K] as int64 or
    // float; weight [K] or null.
    float *size, *average, *codes;
    const int64_t* counts;
    const float* weighted_counts;
    const float *sums, *weight;
};

struct RowNorm {
    float square;     // summed in float
    double at_least;  // at least the norm
};

struct CodeFacts {
    double key;     // weighted sum: equal for equal codes, finite where the code is
    double square;  // |scale (code - centre)|^2
};

// Of a hash (hash.h): lane j has taken every 64th word of 4 bytes from the j-th on, and added up what it was after each.
constexpr int kHashLanes = 64;
struct HashLanes {
    uint32_t value[kHashLanes], sum[kHashLanes];
};

// Rows against `count` codes, at most a group, all as they lie in memory. Sets without a kernel of their own take
// another's.
typedef void UnpreparedKernel(const float* x, int64_t rows, int64_t D, const float* code, int64_t code_stride,
                              int64_t count, bool cosine, float factor, const float* threshold, int64_t first,
                              const Offer& offer);
UnpreparedKernel unprepared_portable, unprepared_avx2;
constexpr int kGroupOfPortable = 4, kGroupOfAvx2 = 8;

// sum += the gradient g of a code as its rotation passes it to x (row_gradient.h), and the error's, 2 (x - q) error,
// unless that is null. left = x - q, unless it is null; it may be x.
typedef void RotationKernel(const float* x, const float* q, const float* g, const float* error, int64_t D, float* sum,
                            float* left);
RotationKernel turn_back_portable, turn_back_avx2;

struct Instructions {
    const char* name;
    int tile;    // rows per register tile of the screening pass,
    int codes;   // and its codes, which lie side by side in the packed codebook
    int lanes;   // values of a vector
    int most_rows;        // of a block, a multiple of the tile; more did not pay
    int64_t block_bytes;  // a fraction of the second cache
    // 0 where the screening pass takes float. Else it rounds to bfloat16, whose wider bounds are worth while at this many
    // times the rate of multiply-adds in float.
    double worth;
    int direct;      // rows that are searched as fast without a preparation as with one (unprepared.h)
    bool (*by_radius)(int64_t D);  // whether the codes lie in the order of their norms, from the centre
    // The layouts of rows and codes, the coefficients of their bounds included, are the set's own.
    int layout;                        // id of the panels, as this set and those that have the same lay them out
    int64_t (*row_bytes)(int64_t D);   // of a row in a block,
    int64_t (*code_bytes)(int64_t D);  // and of a code in a panel
    int64_t (*start_roundings)(int64_t D);  // that a sum's first value passes on its way to the bounds
    // Places at most a tile's rows, from place `first` of the block on.
    void (*place_rows)(const Given& rows, int64_t first, void* block, RowNorm* norms);
    // Fills a panel; `radius`: the codes' norms, rounded up; `start`: the sums' first values; `work` is as large as the
    // panel.
    void (*place_codes)(const Given& codes, const double* radius, const float* start, void* work, void* panel);
    int64_t (*screen_bytes)(int64_t rows, int64_t D, int64_t wanted);  // that `screen` works in
    // All codes against `rows` rows of a block, a multiple of the tile.
    void (*screen)(const void* block, int64_t rows, const Panels& panels, const OpenCodes& open);
    // The same for the largest keys, of panels in the order of `fours` (codebook.h).
    void (*draw)(const void* block, int64_t rows, const Panels& panels, const Draws& draws);
    const Instructions* drawing;  // the set whose layouts `draw` takes; null for this one
    const Instructions* precise;  // one that takes float, for rows that bfloat16 leaves too many candidates; or null
    double too_often;             // share of such rows from which on all others go there at once
    UnpreparedKernel* unprepared;
    int group;  // codes that `unprepared` takes together
    double (*exact_cost)(const double* x, const double* c, int64_t padded, bool cosine);  // exact.h
    double (*exact_distance)(const float* x, const float* c, int64_t D);
    double (*take_off)(float* rest, float* total, const float* code, int64_t D);  // of rest and code, as they were
    RotationKernel* turn_back;
    // out = g + 2 (x - q) error, of a row.
    void (*add_error)(const float* x, const float* q, const float* g, float error, int64_t D, float* out);
    double (*dot)(const double* x, const double* c, int64_t padded);
    CodeFacts (*measure)(const double* code, const double* weights, const double* centre, double scale, int64_t padded);
    void (*add_rows)(const RowSums& task);
    // An EMA update of codes [begin, end): their averages, and the largest magnitude of each; then the codes, which need
    // the total of all sizes.
    void (*move_averages)(const EmaHead& head, int64_t begin, int64_t end, float* largest);
    void (*move_codes)(const EmaHead& head, float total, int64_t begin, int64_t end, const float* largest);
    void (*absorb)(const void* memory, int64_t steps, HashLanes& lanes);  // a step: a word for each lane
    float (*spin)(int64_t steps, float value);
    int spin_products;  // multiply-adds per step
};

// One file each in sets/; those of other processors are not compiled.
extern const Instructions portable, avx2, avx512, avx512_bf16, amx_bf16, bf16_model, amx_model;
bool amx_is_permitted();

// The fastest set that this processor has; VQOPS_CPU names another, for tests. Throws std::runtime_error for a name
// that is none, or that this processor cannot run.
const Instructions& instructions();

// The same, for `sample`.
inline const Instructions& drawing_instructions() {
    const Instructions& set = instructions();
    return set.drawing ? *set.drawing : set;
}

// Multiply-adds per second that registers allow, without loads: the ceiling of the screening pass.
double multiply_add_rate(const Instructions& set);

// Names of what was compiled, separated by blanks, fastest first.
const char* compiled_instructions();

// The exact arithmetic needs gradual underflow and rounding to nearest, whatever the thread was set to.
class DefaultFloatMode {
public:
    DefaultFloatMode();
    ~DefaultFloatMode();

private:
    unsigned saved_;
};

}  // namespace vqops

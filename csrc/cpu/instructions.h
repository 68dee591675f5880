// The kernels that exist once for each instruction set, and the choice between them at run time.
#pragma once

#include <cstdint>

namespace vqops {

constexpr int kPanel = 16;  // codes that lie side by side in the packed codebook
constexpr int kMostTile = 14;

// Where the screening pass puts a code that the bound of a row does not exclude.
struct Offer {
    void* lists;
    void (*candidate)(void* lists, int64_t row, int64_t code, float lower);
};

struct RowNorms {
    float square;  // of the row as float
    float lost;    // square of what its rounding to bfloat16 took away; 0 where there is none
};

struct CodeFacts {
    double key;     // weighted sum: equal for equal codes, finite where the code is
    double square;  // |scale (code - centre)|^2
};

struct Instructions {
    const char* name;
    int tile;    // rows a register tile of the screening pass
    int group;   // rows that the direct search takes together, and the multiple that it reads vectors in
    bool pairs;  // the screening pass takes bfloat16, two dimensions a word, and rows negated; else float
    void (*screen)(const void* x, int64_t rows, int64_t stride, const void* panels, int64_t panel_count, int64_t depth,
                   const float* start, const float* threshold, const Offer& offer);
    void (*direct)(const float* x, int64_t rows, int64_t stride, const float* code, bool cosine, float factor,
                   const float* threshold, int64_t number, const Offer& offer);
    RowNorms (*place_row)(const float* x, const float* centre, float scale, int64_t D, void* out);
    double (*exact_cost)(const double* x, const double* c, int64_t padded, bool cosine);  // exact.h
    double (*exact_distance)(const float* x, const float* c, int64_t D);
    double (*dot)(const double* x, const double* c, int64_t padded);
    CodeFacts (*measure)(const double* code, const double* weights, const double* centre, double scale, int64_t padded);
    float (*spin)(int64_t steps, float value);
    int spin_products;  // multiply-adds a step
};

// The fastest set that this processor has; VQOPS_CPU names another, for tests. Throws std::runtime_error for a name that
// is none, or that this processor cannot run.
const Instructions& instructions();

// Multiply-adds a second that registers allow, without loads: the ceiling of the screening pass.
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

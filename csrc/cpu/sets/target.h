// The compiler's target of an instruction set's file. Headers come before VQOPS_TARGET: an inline function that is
// compiled behind it could be linked into code that runs everywhere.
#pragma once

#include "../../contract.h"
#include "../../ema_step.h"
#include "../instructions.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 says so of what its own header leaves undefined on purpose
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

#define VQOPS_INLINE static inline __attribute__((always_inline))
#define VQOPS_PRAGMA_TEXT(text) _Pragma(#text)
#if defined(__clang__)
#define VQOPS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define VQOPS_TARGET(names) VQOPS_PRAGMA_TEXT(clang attribute push(__attribute__((target(names))), apply_to = function))
#define VQOPS_TARGET_END _Pragma("clang attribute pop")
#else
#define VQOPS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Mask{__VA_ARGS__})
#define VQOPS_TARGET(names) VQOPS_PRAGMA_TEXT(GCC target(names))
#define VQOPS_TARGET_END  // templates are instantiated at the end of the file, and must find the target there
#endif

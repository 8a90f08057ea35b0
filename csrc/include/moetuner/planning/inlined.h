#pragma once

// For what hot loops call: a loop is compiled for the machine's vectors only as a whole.

#if defined(__x86_64__) && defined(__GNUC__)
#define MOETUNER_INLINE __attribute__((always_inline))
#else
#define MOETUNER_INLINE
#endif

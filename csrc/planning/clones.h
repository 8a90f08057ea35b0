#pragma once

// For small hot loops: one binary for every x86-64 machine, with a fast path where the machine has
// it.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__)
#define MOETUNER_CLONES \
  __attribute__((target_clones("arch=icelake-server", "arch=haswell", "default")))
#else
#define MOETUNER_CLONES
#endif

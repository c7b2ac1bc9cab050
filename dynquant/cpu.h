/* Which instruction sets this CPU and this operating system can run.

   Compiled without instruction-set flags. libgcc's tables also check that the operating system saves the
   wide registers. Every feature that the build flag permits is asked for, not only the one that names the
   set: -march=x86-64-v3 lets the compiler emit any of them. */
#ifndef DQ_CPU_H
#define DQ_CPU_H

#if defined(__x86_64__) && defined(__GNUC__)
static int dq_cpu_has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi")
        && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt")
        && __builtin_cpu_supports("movbe") && __builtin_cpu_supports("f16c")
        && __builtin_cpu_supports("popcnt");
}
static int dq_cpu_has_avx512(void) {
    return dq_cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl");
}
static int dq_cpu_has_avx512vnni(void) { return dq_cpu_has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#else
static int dq_cpu_has_avx2(void) { return 0; }
static int dq_cpu_has_avx512(void) { return 0; }
static int dq_cpu_has_avx512vnni(void) { return 0; }
#endif

#ifdef DQ_BUILT_AVX2
#define DQ_HAS_AVX2_BUILD 1
#else
#define DQ_HAS_AVX2_BUILD 0
#endif
#ifdef DQ_BUILT_AVX512
#define DQ_HAS_AVX512_BUILD 1
#else
#define DQ_HAS_AVX512_BUILD 0
#endif
#ifdef DQ_BUILT_AVX512VNNI
#define DQ_HAS_AVX512VNNI_BUILD 1
#else
#define DQ_HAS_AVX512VNNI_BUILD 0
#endif

#endif

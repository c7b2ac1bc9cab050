/* Which instruction sets this CPU and this operating system can run.

   Compiled without instruction-set flags. Every feature that a build flag permits is checked, not only the one
   that names the set, because -march=x86-64-v3 lets the compiler emit any of them. On x86-64 cpuid is read directly:
   compilers differ in the names that __builtin_cpu_supports knows, and MSVC has no such function. On ARM the system
   is asked: a program may not read the registers that tell. */
#ifndef DQ_CPU_H
#define DQ_CPU_H

#if defined(__x86_64__) || defined(_M_X64)

#if defined(__GNUC__) || defined(__clang__)
#include <cpuid.h>
static void dq_cpuid(unsigned leaf, unsigned part, unsigned r[4]) {
    __cpuid_count(leaf, part, r[0], r[1], r[2], r[3]);
}
static unsigned dq_saved_registers(void) {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}
#else
#include <immintrin.h>
#include <intrin.h>
static void dq_cpuid(unsigned leaf, unsigned part, unsigned r[4]) { __cpuidex((int*)r, (int)leaf, (int)part); }
static unsigned dq_saved_registers(void) { return (unsigned)_xgetbv(0); }
#endif

/* Linux lets a process use the tile registers of AMX after it has asked. Other systems are not asked. */
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define DQ_TILES_BY_PERMISSION 1
#else
#define DQ_TILES_BY_PERMISSION 0
#endif

#define DQ_BIT(n) (1u << (n))
static int dq_has(unsigned value, unsigned bits) { return (value & bits) == bits; }

/* 0 baseline, 1 x86-64-v3, 2 x86-64-v4, 3 with AVX512-VNNI, 4 with AMX-INT8: each has all that the ones below it
   have. */
static int dq_cpu_level(void) {
    enum { EAX, EBX, ECX, EDX };
    const unsigned fma = DQ_BIT(12), movbe = DQ_BIT(22), popcnt = DQ_BIT(23), xgetbv = DQ_BIT(27),
                   avx = DQ_BIT(28), f16c = DQ_BIT(29); /* leaf 1, ecx */
    const unsigned bmi = DQ_BIT(3), avx2 = DQ_BIT(5), bmi2 = DQ_BIT(8); /* leaf 7, ebx */
    const unsigned avx512 =
        DQ_BIT(16) | DQ_BIT(17) | DQ_BIT(28) | DQ_BIT(30) | DQ_BIT(31); /* F DQ CD BW VL: leaf 7, ebx */
    const unsigned vnni = DQ_BIT(11);              /* leaf 7, ecx */
    const unsigned amx = DQ_BIT(24) | DQ_BIT(25); /* TILE INT8: leaf 7, edx */
    const unsigned lzcnt = DQ_BIT(5); /* leaf 0x80000001, ecx */
    const unsigned ymm = 0x06;
#if defined(__APPLE__)
    const unsigned zmm = ymm; /* Darwin saves zmm registers from their first use on, and reports them only then. */
#else
    const unsigned zmm = 0xE6;
#endif
    const unsigned tiles = 0x60000;
    unsigned r[4], wide[4];
    dq_cpuid(0, 0, r);
    if (r[EAX] < 7) return 0;
    dq_cpuid(0x80000000u, 0, r);
    if (r[EAX] < 0x80000001u) return 0;
    dq_cpuid(0x80000001u, 0, r);
    if (!dq_has(r[ECX], lzcnt)) return 0;
    dq_cpuid(1, 0, r);
    if (!dq_has(r[ECX], fma | movbe | popcnt | xgetbv | avx | f16c)) return 0;
    dq_cpuid(7, 0, wide);
    if (!dq_has(wide[EBX], bmi | avx2 | bmi2) || !dq_has(dq_saved_registers(), ymm)) return 0;
    if (!dq_has(wide[EBX], avx512) || !dq_has(dq_saved_registers(), zmm)) return 1;
    if (!dq_has(wide[ECX], vnni)) return 2;
    return DQ_TILES_BY_PERMISSION && dq_has(wide[EDX], amx) && dq_has(dq_saved_registers(), tiles) ? 4 : 3;
}

/* VNNI in AVX registers, which processors have with AVX-512 or without. */
static int dq_cpu_has_avxvnni(void) {
    unsigned r[4];
    if (dq_cpu_level() < 1) return 0;
    dq_cpuid(7, 0, r);
    if (r[0] < 1) return 0;
    dq_cpuid(7, 1, r);
    return dq_has(r[0], DQ_BIT(4));
}

#else
static int dq_cpu_level(void) { return 0; }
static int dq_cpu_has_avxvnni(void) { return 0; }
#endif

/* Asks for the permission, for all threads of the process. 0 if it is refused, as it is where the alternate stack
   of a signal handler is too small for these registers. It costs nothing until a thread uses them, which then
   takes 8 KiB more to save. */
static int dq_permit_tiles(void) {
#if DQ_TILES_BY_PERMISSION && defined(__x86_64__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILE_DATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA) == 0;
#else
    return 0;
#endif
}

static int dq_cpu_has_avx2(void) { return dq_cpu_level() >= 1; }
static int dq_cpu_has_avx512(void) { return dq_cpu_level() >= 2; }
static int dq_cpu_has_avx512vnni(void) { return dq_cpu_level() >= 3; }
static int dq_cpu_has_amx(void) { return dq_cpu_level() >= 4; }

/* 0 baseline, 1 armv8.2-a+dotprod, 2 the same with i8mm. armv8.2-a permits CRC32, LSE (atomics) and RDM too. The bits
   are ours, because those of an old C library lack the newer ones. Linux reports what all cores have. */
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
static int dq_arm_level(void) {
    const unsigned long crc32 = 1ul << 7, lse = 1ul << 8, rdm = 1ul << 12, dotprod = 1ul << 20; /* AT_HWCAP */
    const unsigned long needed = crc32 | lse | rdm | dotprod, i8mm = 1ul << 13;                 /* AT_HWCAP2 */
    if ((getauxval(16) & needed) != needed) return 0;
    return getauxval(26) & i8mm ? 2 : 1;
}
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
static int dq_arm_has(const char* feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, NULL, 0) == 0 && value;
}
static int dq_arm_level(void) {
    if (!dq_arm_has("hw.optional.armv8_crc32") || !dq_arm_has("hw.optional.arm.FEAT_LSE") ||
        !dq_arm_has("hw.optional.arm.FEAT_RDM") || !dq_arm_has("hw.optional.arm.FEAT_DotProd"))
        return 0;
    return dq_arm_has("hw.optional.arm.FEAT_I8MM") ? 2 : 1;
}
#else
static int dq_arm_level(void) { return 0; }
#endif

static int dq_cpu_has_dotprod(void) { return dq_arm_level() >= 1; }
static int dq_cpu_has_i8mm(void) { return dq_arm_level() >= 2; }

/* Asks for large pages in n bytes of memory that is not used yet, where that pays. A product with one row reads all
   weights once; with pages of 4 KiB it needs a new page translation every 64 lines. */
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
static inline void dq_prefer_large_pages(void* memory, size_t n) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), skipped = -(size_t)memory & (page - 1);
    if (n >= ((size_t)1 << 22)) (void)madvise((char*)memory + skipped, n - skipped, MADV_HUGEPAGE);
#else
    (void)memory;
    (void)n;
#endif
}

#endif

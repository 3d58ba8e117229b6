// One step of a stage in one call: products with few rows, norms, rotation, attention over pages.
//
// Weights are read where torch (plain matrices) or products.py (packed integers) keeps them; nothing is copied. A matrix
// of integers is packed in bands of 16 outputs: for each input 16 bytes (int8), or for each 8 inputs 64 bytes (int4),
// so that one vector of partial sums belongs to 16 outputs and no sum runs across lanes.
// Compiled for the machine it runs on (native_build.py); AVX512 has paths of its own, the rest is left to the compiler.
// Knows nothing of torch, plans or requests. Layouts of the structs: native.py has the same fields in the same order.

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

enum Kind : int64_t { F32 = 0, BF16 = 1, I8 = 2, I4 = 3 };
constexpr int BAND = 16;   // outputs of one band of packed integers
constexpr int GROUP = 32;  // inputs that share a scale in int4
constexpr int AHEAD = 4096;  // bytes
constexpr int TILE = 4;    // rows computed side by side

struct Matrix {
    const void* data;
    const uint16_t* scales;  // bfloat16: int8 [out], int4 [out / 16][in / 32][16]
    const void* bias;        // in the activations' dtype, or null
    int64_t kind, out, in;
};

struct Norm {
    const void* weight;  // in the activations' dtype; null: no norm here
    float eps, offset;
};

struct Layer {
    int64_t heads, kv_heads, dim, half, window, gelu;  // half: columns of cos; window 0: none
    float scale, softcap;                              // softcap 0: none
    const float *cos, *sin;                            // [positions, half]
    const float* sinks;                                // [heads], or null
    void* cache;                                       // [slots, 2 * kv_heads, dim], in the activations' dtype
    Norm norm_in, q_norm, k_norm, after_attention, norm_mid, after_mlp;
    Matrix qkv, out, gate_up, down;
};

struct Stage {
    const Layer* layers;
    int64_t n_layers, hidden, bf16, page_size, table_width;
    const int32_t* page_table;  // [slots, table_width]
    Norm final;
    Matrix head;  // data null: another stage has it
};

inline float widen(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline uint16_t narrow(float x) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return uint16_t(x == x ? rounded : 0x7FC0);
}

inline float load(const void* p, int64_t i, bool bf16) {
    return bf16 ? widen(static_cast<const uint16_t*>(p)[i]) : static_cast<const float*>(p)[i];
}

// e^x by 2^n * polynomial, 2 ulp; a form that compilers turn into vectors.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = std::floor(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

// ---- threads: workers sleep between steps, and look for a short while before they sleep between phases.

class Pool {
  public:
    explicit Pool(int threads) : threads_(threads) {
        for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            ended_ = true;
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    int threads() const { return threads_; }

    template <class Work> void run(Work&& work) {  // work(thread), on each thread
        if (threads_ == 1) return work(0);
        job_ = [](void* context, int i) { (*static_cast<std::remove_reference_t<Work>*>(context))(i); };
        context_ = &work;
        {
            std::lock_guard<std::mutex> hold(mutex_);
            working_ = threads_ - 1;
            jobs_++;
        }
        wake_.notify_all();
        work(0);
        std::unique_lock<std::mutex> hold(mutex_);
        done_.wait(hold, [this] { return working_ == 0; });
    }

    // Returns when every thread has come here; what each wrote before is seen by all. Counters of items start anew.
    void meet() {
        if (threads_ == 1) {
            next_[(phase_ + 1) & 1].store(0, std::memory_order_relaxed);
            phase_++;
            return;
        }
        uint32_t phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            next_[(phase + 1) & 1].store(0, std::memory_order_relaxed);
            {
                std::lock_guard<std::mutex> hold(mutex_);
                phase_.store(phase + 1, std::memory_order_release);
            }
            if (sleepers_.load() > 0) met_.notify_all();
            return;
        }
        for (int i = 0; i < SPINS; i++) {
            if (phase_.load(std::memory_order_acquire) != phase) return;
#if defined(__x86_64__)
            _mm_pause();
#endif
        }
        std::unique_lock<std::mutex> hold(mutex_);
        sleepers_++;
        met_.wait(hold, [&] { return phase_.load(std::memory_order_acquire) != phase; });
        sleepers_--;
    }

    // The items of this phase, in blocks of `block`: each block is given to whichever thread comes first.
    template <class Item> void share(int64_t items, int64_t block, Item&& item) {
        std::atomic<int64_t>& next = next_[phase_.load(std::memory_order_relaxed) & 1];
        for (;;) {
            int64_t start = next.fetch_add(block, std::memory_order_relaxed);
            if (start >= items) return;
            item(start, start + block < items ? start + block : items);
        }
    }

  private:
    // About 20 us: phases of a layer take 10 to 200, and a thread that cannot get a core must not burn another's.
    static constexpr int SPINS = 400;

    void work(int i) {
        uint64_t seen = 0;
        for (;;) {
            {
                std::unique_lock<std::mutex> hold(mutex_);
                wake_.wait(hold, [&] { return ended_ || jobs_ != seen; });
                if (ended_) return;
                seen = jobs_;
            }
            job_(context_, i);
            std::lock_guard<std::mutex> hold(mutex_);
            if (--working_ == 0) done_.notify_one();
        }
    }

    const int threads_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_, done_, met_;
    bool ended_ = false;
    uint64_t jobs_ = 0;
    int working_ = 0;
    void (*job_)(void*, int) = nullptr;
    void* context_ = nullptr;
    std::atomic<uint32_t> phase_{0};
    std::atomic<int> arrived_{0}, sleepers_{0};
    std::atomic<int64_t> next_[2] = {};
};

// ---- products. x: the rows, once as float and, where the processor multiplies bfloat16, once as that.

struct Rows {
    std::vector<float> wide;
    std::vector<uint16_t> half;
    int64_t n = 0, width = 0;
    void shape(int64_t rows, int64_t columns) {
        n = rows, width = columns;
        if (int64_t(wide.size()) < rows * columns) wide.resize(rows * columns), half.resize(rows * columns);
    }
    float* row(int64_t i) { return wide.data() + i * width; }
    const float* row(int64_t i) const { return wide.data() + i * width; }
    const uint16_t* half_row(int64_t i) const { return half.data() + i * width; }
    void round(int64_t i) {  // to bfloat16: what the torch operators would hand on
        for (int64_t k = 0; k < width; k++) {
            half[i * width + k] = narrow(wide[i * width + k]);
            wide[i * width + k] = widen(half[i * width + k]);
        }
    }
};

// What comes next is asked for early: rows are too short for the processor to see by itself that one follows the other.
// A macro: GCC takes a function that only asks for memory to have no effect, and leaves its calls out.
#define AHEAD_OF(p) __builtin_prefetch(p, 0, 3)

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LLMD_AVX512 1
inline __m512 wide_of(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline __m512 four_in_one(const __m512* p) {
    return _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]));
}
#endif
#if defined(LLMD_AVX512) && defined(__AVX512BF16__)
#define LLMD_BF16 1
inline __m512bh pairs(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh pair_of(const uint16_t* p) {
    int32_t two;
    std::memcpy(&two, p, 4);
    return (__m512bh)_mm512_set1_epi32(two);
}
#endif

template <int M> void dot_f32(const float* const* w, int64_t in, const Rows& x, int64_t m0, float (*y)[4]) {
#if defined(LLMD_AVX512)
    // One row after the other: memory is read in one stream, as it lies. Two sums, as each must wait for the one before.
    for (int r = 0; r < 4; r++) {
        __m512 sum[M][2];
        for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
        const float* p = w[r];
        for (int64_t k = 0; k < in; k += 32) {
            if (m0 == 0) AHEAD_OF(p + k + AHEAD / 4), AHEAD_OF(p + k + 16 + AHEAD / 4);
            __m512 v0 = _mm512_loadu_ps(p + k), v1 = _mm512_loadu_ps(p + k + 16);
            for (int m = 0; m < M; m++) {
                sum[m][0] = _mm512_fmadd_ps(v0, _mm512_loadu_ps(x.row(m0 + m) + k), sum[m][0]);
                sum[m][1] = _mm512_fmadd_ps(v1, _mm512_loadu_ps(x.row(m0 + m) + k + 16), sum[m][1]);
            }
        }
        for (int m = 0; m < M; m++) y[m][r] = _mm512_reduce_add_ps(_mm512_add_ps(sum[m][0], sum[m][1]));
    }
#else
    for (int m = 0; m < M; m++) {
        const float* a = x.row(m0 + m);
        for (int r = 0; r < 4; r++) {
            const float* p = w[r];
            float sum = 0;
#pragma GCC ivdep
            for (int64_t k = 0; k < in; k++) sum += p[k] * a[k];
            y[m][r] = sum;
        }
    }
#endif
}

template <int M> void dot_bf16(const uint16_t* const* w, int64_t in, const Rows& x, int64_t m0, float (*y)[4]) {
#if defined(LLMD_BF16)
    // One row after the other: memory is read in one stream, as it lies. Two sums, as each must wait for the one before.
    for (int r = 0; r < 4; r++) {
        __m512 sum[M][2];
        for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
        const uint16_t* p = w[r];
        int64_t k = 0;
        for (; k + 64 <= in; k += 64) {
            if (m0 == 0) AHEAD_OF(p + k + AHEAD / 2), AHEAD_OF(p + k + 32 + AHEAD / 2);
            __m512bh v0 = pairs(p + k), v1 = pairs(p + k + 32);
            for (int m = 0; m < M; m++) {
                sum[m][0] = _mm512_dpbf16_ps(sum[m][0], v0, pairs(x.half_row(m0 + m) + k));
                sum[m][1] = _mm512_dpbf16_ps(sum[m][1], v1, pairs(x.half_row(m0 + m) + k + 32));
            }
        }
        for (; k < in; k += 32)
            for (int m = 0; m < M; m++)
                sum[m][0] = _mm512_dpbf16_ps(sum[m][0], pairs(p + k), pairs(x.half_row(m0 + m) + k));
        for (int m = 0; m < M; m++) y[m][r] = _mm512_reduce_add_ps(_mm512_add_ps(sum[m][0], sum[m][1]));
    }
#else
    for (int m = 0; m < M; m++) {
        const float* a = x.row(m0 + m);
        float s[4] = {0, 0, 0, 0};
        for (int r = 0; r < 4; r++) {
            const uint16_t* p = w[r];
            float sum = 0;
#pragma GCC ivdep
            for (int64_t k = 0; k < in; k++) sum += widen(p[k]) * a[k];
            s[r] = sum;
        }
        std::memcpy(y[m], s, sizeof s);
    }
#endif
}

// One band of 16 outputs. y: [M][16].
template <int M> void band_i8(const Matrix& a, int64_t band, const Rows& x, int64_t m0, float (*y)[BAND]) {
    const int8_t* w = static_cast<const int8_t*>(a.data) + band * BAND * a.in;
    const uint16_t* scale = a.scales + band * BAND;
#if defined(LLMD_AVX512)
    __m512 sum[M][4];  // four, as each must wait for the one before
    for (int m = 0; m < M; m++)
        for (int e = 0; e < 4; e++) sum[m][e] = _mm512_setzero_ps();
    for (int64_t k = 0; k < a.in; k += 4) {
        if (m0 == 0) AHEAD_OF(w + k * BAND + AHEAD);
        for (int e = 0; e < 4; e++) {
            __m512 v = _mm512_cvtepi32_ps(
                _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(w + (k + e) * BAND))));
            for (int m = 0; m < M; m++) sum[m][e] = _mm512_fmadd_ps(v, _mm512_set1_ps(x.row(m0 + m)[k + e]), sum[m][e]);
        }
    }
    __m512 s = wide_of(scale);
    for (int m = 0; m < M; m++) _mm512_storeu_ps(y[m], _mm512_mul_ps(four_in_one(sum[m]), s));
#else
    for (int m = 0; m < M; m++) {
        float sum[BAND] = {};
        const float* p = x.row(m0 + m);
        for (int64_t k = 0; k < a.in; k++)
            for (int r = 0; r < BAND; r++) sum[r] += float(w[k * BAND + r]) * p[k];
        for (int r = 0; r < BAND; r++) y[m][r] = sum[r] * widen(scale[r]);
    }
#endif
}

template <int M> void band_i4(const Matrix& a, int64_t band, const Rows& x, int64_t m0, float (*y)[BAND]) {
    const uint16_t* w = static_cast<const uint16_t*>(a.data) + band * BAND * a.in / 4;
    const uint16_t* scale = a.scales + band * BAND * (a.in / GROUP);
#if defined(LLMD_BF16)
    // By nibble the bfloat16 of nibble - 8; twice, since the lookup reads five bits of each word.
    alignas(64) static const uint16_t VALUES[32] = {
        0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000,
        0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040,
        0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0};
    const __m512i values = _mm512_load_si512(VALUES);
    __m512 sum[M];
    for (int m = 0; m < M; m++) sum[m] = _mm512_setzero_ps();
    for (int64_t g = 0; g < a.in / GROUP; g++) {
        __m512 part[M][4];
        for (int m = 0; m < M; m++)
            for (int i = 0; i < 4; i++) part[m][i] = _mm512_setzero_ps();
        for (int t = 0; t < GROUP / 8; t++) {
            if (m0 == 0) AHEAD_OF(w + (g * (GROUP / 8) + t) * 32 + AHEAD / 2);
            __m512i four = _mm512_loadu_si512(w + (g * (GROUP / 8) + t) * 32);
            for (int i = 0; i < 4; i++) {
                __m512bh v = (__m512bh)_mm512_permutexvar_epi16(four, values);
                for (int m = 0; m < M; m++)
                    part[m][i] = _mm512_dpbf16_ps(part[m][i], v, pair_of(x.half_row(m0 + m) + g * GROUP + t * 8 + i * 2));
                four = _mm512_srli_epi16(four, 4);
            }
        }
        __m512 s = wide_of(scale + g * BAND);
        for (int m = 0; m < M; m++) sum[m] = _mm512_fmadd_ps(four_in_one(part[m]), s, sum[m]);
    }
    for (int m = 0; m < M; m++) _mm512_storeu_ps(y[m], sum[m]);
#else
    for (int m = 0; m < M; m++) {
        float sum[BAND] = {};
        for (int64_t g = 0; g < a.in / GROUP; g++) {
            float part[BAND] = {};
            for (int k = 0; k < GROUP; k++) {
                const uint16_t* words = w + (g * (GROUP / 8) + k / 8) * 32;
                int shift = (k % 8) / 2 * 4, parity = k % 2;
                float p = x.row(m0 + m)[g * GROUP + k];
                for (int r = 0; r < BAND; r++) part[r] += float(int((words[2 * r + parity] >> shift) & 15) - 8) * p;
            }
            for (int r = 0; r < BAND; r++) sum[r] += part[r] * widen(scale[g * BAND + r]);
        }
        std::memcpy(y[m], sum, sizeof sum);
    }
#endif
}

// Outputs [start, start + 16) of rows [m0, m0 + M): put(row, output, value).
template <int M, class Put> void tile(const Matrix& a, bool bf16, const Rows& x, int64_t m0, int64_t start, Put&& put) {
    float y[M][BAND];
    if (a.kind == I8) {
        band_i8<M>(a, start / BAND, x, m0, y);
    } else if (a.kind == I4) {
        band_i4<M>(a, start / BAND, x, m0, y);
    } else {
        auto row_of = [&](int64_t o) { return o < a.out ? o : a.out - 1; };  // a last band may be short
        for (int64_t o = start; o < start + BAND; o += 4) {
            float four[M][4];
            if (a.kind == BF16) {
                const uint16_t* w[4];
                for (int r = 0; r < 4; r++) w[r] = static_cast<const uint16_t*>(a.data) + row_of(o + r) * a.in;
                dot_bf16<M>(w, a.in, x, m0, four);
            } else {
                const float* w[4];
                for (int r = 0; r < 4; r++) w[r] = static_cast<const float*>(a.data) + row_of(o + r) * a.in;
                dot_f32<M>(w, a.in, x, m0, four);
            }
            for (int m = 0; m < M; m++) std::memcpy(&y[m][o - start], four[m], sizeof four[m]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int r = 0; r < BAND && start + r < a.out; r++) {
            float bias = a.bias ? load(a.bias, start + r, bf16) : 0.0f;
            put(m0 + m, start + r, y[m][r] + bias);
        }
}

template <class Put> void band_of(const Matrix& a, bool bf16, const Rows& x, int64_t start, Put&& put) {
    int64_t m = 0;
    for (; m + TILE <= x.n; m += TILE) tile<TILE>(a, bf16, x, m, start, put);
    switch (x.n - m) {
        case 3: return tile<3>(a, bf16, x, m, start, put);
        case 2: return tile<2>(a, bf16, x, m, start, put);
        case 1: return tile<1>(a, bf16, x, m, start, put);
    }
}

// ---- the rest of a layer

void normalise(const Norm& norm, bool bf16, const float* x, int64_t n, float* out) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    float factor = 1.0f / std::sqrt(sum / float(n) + norm.eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor * (load(norm.weight, i, bf16) + norm.offset);
}

void rotate(const Layer& a, float* x, int64_t position) {
    const float *cos = a.cos + position * a.half, *sin = a.sin + position * a.half;
    for (int64_t i = 0; i < a.half; i++) {
        float first = x[i], second = x[i + a.half];
        x[i] = first * cos[i] - second * sin[i];
        x[i + a.half] = second * cos[i] + first * sin[i];
    }
}

struct Scratch {  // of one thread
    Rows x;       // the rows a product reads
    std::vector<float> scores, keys;
};

struct Runner {
    const Stage* stage;
    Pool pool;
    std::vector<Scratch> scratch;
    Rows qkv, mixed, inner, residual, branch;
    Runner(const Stage* s, int threads) : stage(s), pool(threads), scratch(threads) {}
};

inline int64_t place_of(const Stage& s, int32_t slot, int64_t position) {
    return int64_t(s.page_table[slot * s.table_width + position / s.page_size]) * s.page_size + position % s.page_size;
}

template <bool HALF> struct Kept;
template <> struct Kept<true> {
    using T = uint16_t;
    static float get(T x) { return widen(x); }
    static T put(float x) { return narrow(x); }
};
template <> struct Kept<false> {
    using T = float;
    static float get(T x) { return x; }
    static T put(float x) { return x; }
};

// Rotates the queries and the key of one row's KV head, and keeps key and value.
template <bool HALF>
void keep(const Stage& s, const Layer& a, float* row, int64_t head, int32_t slot, int64_t position) {
    using K = Kept<HALF>;
    int64_t group = a.heads / a.kv_heads;
    float *q = row + head * group * a.dim, *k = row + (a.heads + head) * a.dim;
    float* v = row + (a.heads + a.kv_heads + head) * a.dim;
    for (int64_t g = 0; g < group; g++) {
        if (a.q_norm.weight) normalise(a.q_norm, HALF, q + g * a.dim, a.dim, q + g * a.dim);
        rotate(a, q + g * a.dim, position);
    }
    if (a.k_norm.weight) normalise(a.k_norm, HALF, k, a.dim, k);
    rotate(a, k, position);
    typename K::T* at = static_cast<typename K::T*>(a.cache) + place_of(s, slot, position) * 2 * a.kv_heads * a.dim;
    for (int64_t i = 0; i < a.dim; i++) {
        at[head * a.dim + i] = K::put(k[i]);
        at[(a.kv_heads + head) * a.dim + i] = K::put(v[i]);
    }
}

// One row's queries of one KV head over all positions up to its own.
template <bool HALF>
void attend(const Stage& s, const Layer& a, Scratch& mine, const float* row, int64_t head, int32_t slot,
            int64_t position, float* out) {
    using K = Kept<HALF>;
    int64_t group = a.heads / a.kv_heads, dim = a.dim, stride = 2 * a.kv_heads * dim;
    int64_t first = a.window && position + 1 > a.window ? position + 1 - a.window : 0, n = position + 1 - first;
    const typename K::T* cache = static_cast<const typename K::T*>(a.cache);
    if (int64_t(mine.scores.size()) < group * n) mine.scores.resize(group * n);
    mine.keys.resize(dim);
    float *scores = mine.scores.data(), *wide = mine.keys.data();
    const float* q = row + head * group * dim;
    for (int64_t t = 0; t < n; t++) {
        const typename K::T* k = cache + place_of(s, slot, first + t) * stride + head * dim;
        for (int64_t i = 0; i < dim; i++) wide[i] = K::get(k[i]);
        for (int64_t g = 0; g < group; g++) {
            float sum = 0;
            for (int64_t i = 0; i < dim; i++) sum += q[g * dim + i] * wide[i];
            scores[g * n + t] = sum * a.scale;
        }
    }
    for (int64_t g = 0; g < group; g++) {
        float *p = scores + g * n, best = a.sinks ? a.sinks[head * group + g] : -3e38f, total = 0;
        if (a.softcap != 0.0f)
            for (int64_t t = 0; t < n; t++) p[t] = std::tanh(p[t] / a.softcap) * a.softcap;
        for (int64_t t = 0; t < n; t++) best = p[t] > best ? p[t] : best;
        for (int64_t t = 0; t < n; t++) p[t] = exponential(p[t] - best);
        for (int64_t t = 0; t < n; t++) total += p[t];
        if (a.sinks) total += exponential(a.sinks[head * group + g] - best);
        float factor = 1.0f / total;
        for (int64_t t = 0; t < n; t++) p[t] *= factor;
        for (int64_t i = 0; i < dim; i++) out[g * dim + i] = 0;
    }
    for (int64_t t = 0; t < n; t++) {
        const typename K::T* v = cache + place_of(s, slot, first + t) * stride + (a.kv_heads + head) * dim;
        for (int64_t i = 0; i < dim; i++) wide[i] = K::get(v[i]);
        for (int64_t g = 0; g < group; g++) {
            float p = scores[g * n + t];
            for (int64_t i = 0; i < dim; i++) out[g * dim + i] += p * wide[i];
        }
    }
}

inline float activate(float gate, bool gelu) {
    if (!gelu) return gate / (1.0f + exponential(-gate));
    float inner = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);
    return gate * (1.0f - 1.0f / (exponential(2.0f * inner) + 1.0f));
}

void read_normed(const Norm& norm, bool bf16, const Rows& from, Rows& into) {
    into.shape(from.n, from.width);
    for (int64_t m = 0; m < from.n; m++) {
        normalise(norm, bf16, from.row(m), from.width, into.row(m));
        if (bf16) into.round(m);
    }
}

void read_rounded(bool bf16, const Rows& from, Rows& into) {
    into.shape(from.n, from.width);
    std::memcpy(into.wide.data(), from.wide.data(), sizeof(float) * from.n * from.width);
    if (bf16)
        for (int64_t m = 0; m < from.n; m++) into.round(m);
}

// into += a * x, through a norm where the model has one there; everybody computes the norm of the whole, each for itself.
void add_product(Runner& r, const Matrix& a, const Norm& after, Scratch& mine) {
    bool bf16 = r.stage->bf16;
    Rows& to = after.weight ? r.branch : r.residual;
    r.pool.share(a.out, BAND, [&](int64_t start, int64_t) {
        band_of(a, bf16, mine.x, start, [&](int64_t m, int64_t o, float y) {
            float* at = to.row(m) + o;
            *at = after.weight ? y : *at + y;
        });
    });
    r.pool.meet();
    if (after.weight) {
        r.pool.share(to.n, 1, [&](int64_t m, int64_t) {
            float *y = to.row(m), *x = r.residual.row(m);
            normalise(after, bf16, y, to.width, y);
            for (int64_t i = 0; i < to.width; i++) x[i] += y[i];
        });
        r.pool.meet();
    }
}

template <bool HALF>
void run_layer(Runner& r, const Layer& a, Scratch& mine, const int32_t* slots, const int32_t* positions, bool alone) {
    const Stage& s = *r.stage;
    int64_t n = r.residual.n;
    read_normed(a.norm_in, HALF, r.residual, mine.x);
    r.pool.share(a.qkv.out, BAND, [&](int64_t start, int64_t) {
        band_of(a.qkv, HALF, mine.x, start, [&](int64_t m, int64_t o, float y) { r.qkv.row(m)[o] = y; });
    });
    r.pool.meet();
    int64_t group = a.heads / a.kv_heads;
    auto kept = [&](int64_t i) {
        int64_t m = i / a.kv_heads;
        keep<HALF>(s, a, r.qkv.row(m), i % a.kv_heads, slots[m], positions[m]);
    };
    if (!alone) {  // rows of one sequence see each other's keys
        r.pool.share(n * a.kv_heads, 1, [&](int64_t i, int64_t) { kept(i); });
        r.pool.meet();
    }
    r.pool.share(n * a.kv_heads, 1, [&](int64_t i, int64_t) {
        int64_t m = i / a.kv_heads, head = i % a.kv_heads;
        if (alone) kept(i);
        float* out = r.mixed.row(m) + head * group * a.dim;
        attend<HALF>(s, a, mine, r.qkv.row(m), head, slots[m], positions[m], out);
    });
    r.pool.meet();
    read_rounded(HALF, r.mixed, mine.x);
    add_product(r, a.out, a.after_attention, mine);
    read_normed(a.norm_mid, HALF, r.residual, mine.x);
    int64_t width = a.down.in;
    r.pool.share(width, BAND, [&](int64_t start, int64_t) {
        band_of(a.gate_up, HALF, mine.x, start, [&](int64_t m, int64_t o, float y) { r.inner.row(m)[o] = y; });
        band_of(a.gate_up, HALF, mine.x, width + start, [&](int64_t m, int64_t o, float y) {
            float* at = r.inner.row(m) + (o - width);
            *at = activate(*at, a.gelu) * y;
        });
    });
    r.pool.meet();
    read_rounded(HALF, r.inner, mine.x);
    add_product(r, a.down, a.after_mlp, mine);
}

template <bool HALF>
void run_step(Runner& r, void* rows, int64_t n, const int32_t* slots, const int32_t* positions, bool alone,
              const int32_t* drawn, int64_t n_drawn, float* logits) {
    using K = Kept<HALF>;
    const Stage& s = *r.stage;
    auto* x = static_cast<typename K::T*>(rows);
    r.residual.shape(n, s.hidden), r.branch.shape(n, s.hidden);
    for (int64_t i = 0; i < n * s.hidden; i++) r.residual.wide[i] = K::get(x[i]);
    for (int64_t i = 0; i < s.n_layers; i++) {  // the largest first: later ones only change the shape
        const Layer& a = s.layers[i];
        r.qkv.shape(n, a.qkv.out), r.mixed.shape(n, a.heads * a.dim), r.inner.shape(n, a.down.in);
    }
    r.pool.run([&](int thread) {
        Scratch& mine = r.scratch[thread];
        for (int64_t i = 0; i < s.n_layers; i++) run_layer<HALF>(r, s.layers[i], mine, slots, positions, alone);
        if (!s.head.data || !n_drawn) return;
        mine.x.shape(n_drawn, s.hidden);
        for (int64_t m = 0; m < n_drawn; m++) {
            std::vector<float>& row = mine.keys;
            row.resize(s.hidden);
            for (int64_t i = 0; i < s.hidden; i++) row[i] = K::get(K::put(r.residual.row(drawn[m])[i]));
            normalise(s.final, HALF, row.data(), s.hidden, mine.x.row(m));
            if (HALF) mine.x.round(m);
        }
        r.pool.share(s.head.out, BAND * 8, [&](int64_t start, int64_t stop) {
            for (; start < stop; start += BAND)
                band_of(s.head, HALF, mine.x, start, [&](int64_t m, int64_t o, float y) { logits[m * s.head.out + o] = y; });
        });
        r.pool.meet();
    });
    for (int64_t i = 0; i < n * s.hidden; i++) x[i] = K::put(r.residual.wide[i]);
}

}  // namespace

extern "C" {

// Of a stage whose struct and memory live as long as the runner.
void* llmd_runner(const Stage* stage, int64_t threads) { return new Runner(stage, int(threads)); }

void llmd_end(void* runner) { delete static_cast<Runner*>(runner); }

// rows [n, hidden], overwritten with what leaves. alone: no two rows are of one sequence. drawn: rows whose logits are wanted.
void llmd_step(void* runner, void* rows, int64_t n, const int32_t* slots, const int32_t* positions, int64_t alone,
               const int32_t* drawn, int64_t n_drawn, float* logits) {
    Runner& r = *static_cast<Runner*>(runner);
    if (r.stage->bf16)
        run_step<true>(r, rows, n, slots, positions, alone, drawn, n_drawn, logits);
    else
        run_step<false>(r, rows, n, slots, positions, alone, drawn, n_drawn, logits);
}

// The integers of a packed matrix in bfloat16, [out, in]: int4 times their scales, int8 as they are.
void llmd_widen(const Matrix* matrix, uint16_t* out) {
    const Matrix& a = *matrix;
    for (int64_t band = 0; band < a.out / BAND; band++) {
        uint16_t* rows = out + band * BAND * a.in;
        if (a.kind == I8) {
            const int8_t* w = static_cast<const int8_t*>(a.data) + band * BAND * a.in;
            for (int64_t r = 0; r < BAND; r++)
                for (int64_t k = 0; k < a.in; k++) rows[r * a.in + k] = narrow(float(w[k * BAND + r]));
            continue;
        }
        const uint16_t* w = static_cast<const uint16_t*>(a.data) + band * BAND * a.in / 4;
        const uint16_t* scales = a.scales + band * BAND * (a.in / GROUP);
        for (int64_t r = 0; r < BAND; r++)
            for (int64_t t = 0; t < a.in / 8; t++) {
                float scale = widen(scales[t / (GROUP / 8) * BAND + r]);
                for (int64_t i = 0; i < 8; i++) {
                    int nibble = (w[t * 32 + 2 * r + i % 2] >> (i / 2 * 4)) & 15;
                    rows[r * a.in + t * 8 + i] = narrow(float(nibble - 8) * scale);
                }
            }
    }
}

// What this build multiplies with, for people.
const char* llmd_lanes() {
#if defined(LLMD_BF16)
    return "avx512_bf16";
#elif defined(LLMD_AVX512)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#else
    return "plain";
#endif
}
}

// SHA-256 over the rows of a stage boundary and the pages of their tree, as rows.py defines them, many in one call.
//
// Nothing is kept between calls and nothing allocated, so any number of threads may call at once.

#include <cstdint>
#include <cstring>

#if defined(__SHA__) && defined(__SSE4_1__)
#include <immintrin.h>
#define HAS_SHA_UNIT 1
#endif

namespace {

constexpr int64_t kPageRows = 16;

alignas(64) constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

#ifdef HAS_SHA_UNIT

// The unit keeps the state as (a, b, e, f) and (c, d, g, h), from the high lane to the low one.
struct State {
    __m128i abef, cdgh;
};

State start() {
    return {_mm_set_epi32(0x6a09e667, int(0xbb67ae85), 0x510e527f, int(0x9b05688c)),
            _mm_set_epi32(0x3c6ef372, int(0xa54ff53a), 0x1f83d9ab, 0x5be0cd19)};
}

void absorb(State& state, const uint8_t* block) {
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    __m128i abef = state.abef, cdgh = state.cdgh, words[16];
    for (int i = 0; i < 16; ++i) {  // four rounds each
        if (i < 4) {
            words[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(block + 16 * i)), big_endian);
        } else {
            const __m128i older = _mm_sha256msg1_epu32(words[i - 4], words[i - 3]);
            const __m128i middle = _mm_alignr_epi8(words[i - 1], words[i - 2], 4);
            words[i] = _mm_sha256msg2_epu32(_mm_add_epi32(older, middle), words[i - 1]);
        }
        const __m128i keyed = _mm_add_epi32(words[i], _mm_load_si128((const __m128i*)(kRound + 4 * i)));
        cdgh = _mm_sha256rnds2_epu32(cdgh, abef, keyed);
        abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(keyed, 0x0e));
    }
    state.abef = _mm_add_epi32(state.abef, abef);
    state.cdgh = _mm_add_epi32(state.cdgh, cdgh);
}

void finish(const State& state, uint8_t* out) {
    alignas(16) uint32_t first[4], second[4];  // f e b a, h g d c
    _mm_store_si128((__m128i*)first, state.abef);
    _mm_store_si128((__m128i*)second, state.cdgh);
    const uint32_t words[8] = {first[3], first[2], second[3], second[2], first[1], first[0], second[1], second[0]};
    for (int i = 0; i < 8; ++i) {
        const uint32_t swapped = __builtin_bswap32(words[i]);
        std::memcpy(out + 4 * i, &swapped, 4);
    }
}

#else

struct State {
    uint32_t words[8];
};

State start() {
    return {{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}};
}

uint32_t turn(uint32_t x, int by) { return x >> by | x << (32 - by); }

void absorb(State& state, const uint8_t* block) {
    uint32_t w[64];
    for (int i = 0; i < 16; ++i) {
        w[i] = uint32_t(block[4 * i]) << 24 | uint32_t(block[4 * i + 1]) << 16 | uint32_t(block[4 * i + 2]) << 8 |
               block[4 * i + 3];
    }
    for (int i = 16; i < 64; ++i) {
        const uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (turn(a, 7) ^ turn(a, 18) ^ a >> 3) + w[i - 7] + (turn(b, 17) ^ turn(b, 19) ^ b >> 10);
    }
    uint32_t s[8];
    std::memcpy(s, state.words, sizeof s);
    for (int i = 0; i < 64; ++i) {
        const uint32_t sum_e = turn(s[4], 6) ^ turn(s[4], 11) ^ turn(s[4], 25);
        const uint32_t choice = (s[4] & s[5]) ^ (~s[4] & s[6]);
        const uint32_t one = s[7] + sum_e + choice + kRound[i] + w[i];
        const uint32_t sum_a = turn(s[0], 2) ^ turn(s[0], 13) ^ turn(s[0], 22);
        const uint32_t two = sum_a + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        std::memmove(s + 1, s, 7 * sizeof *s);
        s[4] += one;
        s[0] = one + two;
    }
    for (int i = 0; i < 8; ++i) state.words[i] += s[i];
}

void finish(const State& state, uint8_t* out) {
    for (int i = 0; i < 8; ++i) {
        for (int k = 0; k < 4; ++k) out[4 * i + k] = uint8_t(state.words[i] >> (24 - 8 * k));
    }
}

#endif

// SHA-256 of the 64 bytes of `head` and then `size` bytes of `rest`.
void hash(const uint8_t* head, const uint8_t* rest, int64_t size, uint8_t* out) {
    State state = start();
    absorb(state, head);
    int64_t at = 0;
    for (; at + 64 <= size; at += 64) absorb(state, rest + at);
    uint8_t last[128] = {};
    const int64_t left = size - at, blocks = left + 9 <= 64 ? 1 : 2;
    if (left > 0) std::memcpy(last, rest + at, left);
    last[left] = 0x80;
    const uint64_t bits = uint64_t(size + 64) * 8;
    for (int i = 0; i < 8; ++i) last[64 * blocks - 1 - i] = uint8_t(bits >> (8 * i));
    for (int64_t i = 0; i < blocks; ++i) absorb(state, last + 64 * i);
    finish(state, out);
}

// The inner node over two hashes that lie one after the other; out may be where they lie.
void join(const uint8_t* both, uint8_t* out) {
    uint8_t said[65];
    said[0] = 1;
    std::memcpy(said + 1, both, 64);
    hash(said, said + 64, 1, out);
}

void leaf(const uint8_t* prefix, uint64_t position, const uint8_t* row, int64_t row_bytes, uint8_t* out) {
    uint8_t head[64];
    std::memcpy(head, prefix, 56);
    for (int i = 0; i < 8; ++i) head[56 + i] = uint8_t(position >> (8 * i));
    hash(head, row, row_bytes, out);
}

}  // namespace

extern "C" {

// spans [n_spans, 2]: first position and rows of each run. out [rows, 32].
void llmd_leaves(const uint8_t* prefix, const int64_t* spans, int64_t n_spans, const uint8_t* rows, int64_t row_bytes,
                 uint8_t* out) {
    for (int64_t i = 0; i < n_spans; ++i) {
        for (int64_t k = 0; k < spans[2 * i + 1]; ++k, rows += row_bytes, out += 32) {
            leaf(prefix, uint64_t(spans[2 * i] + k), rows, row_bytes, out);
        }
    }
}

// leaves [pages, 16, 32], out [pages, 32].
void llmd_page_roots(const uint8_t* leaves, int64_t n_pages, uint8_t* out) {
    uint8_t level[32 * kPageRows];
    for (int64_t i = 0; i < n_pages; ++i, leaves += 32 * kPageRows, out += 32) {
        std::memcpy(level, leaves, sizeof level);
        for (int64_t width = kPageRows; width > 1; width /= 2) {
            for (int64_t k = 0; k < width / 2; ++k) join(level + 64 * k, level + 32 * k);
        }
        std::memcpy(out, level, 32);
    }
}

// The root over n rows, of which the first stands at position `first`; n > 0. out [32].
void llmd_rows_root(const uint8_t* prefix, int64_t first, int64_t n, const uint8_t* rows, int64_t row_bytes,
                    uint8_t* out) {
    uint8_t roots[32 * 65];  // of the full subtrees that tile the rows so far, and one leaf more
    int64_t held = 0;
    for (int64_t i = 0; i < n; ++i) {
        leaf(prefix, uint64_t(first + i), rows + i * row_bytes, row_bytes, roots + 32 * held++);
        for (int64_t filled = i; filled & 1; filled >>= 1, --held) join(roots + 32 * (held - 2), roots + 32 * (held - 2));
    }
    for (; held > 1; --held) join(roots + 32 * (held - 2), roots + 32 * (held - 2));
    std::memcpy(out, roots, 32);
}
}

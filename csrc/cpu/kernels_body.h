// The verbs of patch_gather.h on images [begin, end), in namespace SPCXR_ISA: the including file
// names it, CMake gives its compiler flags. What is inline in a header must not leave this object
// file (a linker would let one copy, say AVX-512's, serve them all), so it is always inlined.
#define SPCXR_HD inline __attribute__((always_inline))

#include "cpu/kernels.h"

#include "cpu/fill.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

bool any_of(const Fill& f, FillKind kind, int64_t begin, int64_t end) {
  if (f.mask == nullptr) return false;
  for (int64_t b = begin; b < end; ++b) {
    if (f.kind[b] == kind) return true;
  }
  return false;
}

// The scratch of a call and what works in it.
class Gather {
 public:
  Gather(Parts& parts, const Views& views, const Fill& fill, bool shuffle)
      : v_(views),
        f_(fill),
        bench_(parts, views),
        own_(parts, views, bench_),
        partner_(parts, views, bench_),
        cover_(parts, views, fill.mask, fill.unit),
        noise_(parts, views),
        shuffle_(parts, views, shuffle),
        values_(parts.take<float>(views.row_length())),
        states_(parts.take<Cover::State>(views.patches())),
        wanted_(parts.take<bool>(views.grid_w())) {}

  void operator()(int64_t b, uint8_t* tokens, Sink sink) {
    tokens_ = tokens;
    sink_ = sink;
    bool some = false;
    for (int32_t n = 0; n < v_.patches(); ++n) {
      states_[n] = cover_.state(b, n);
      some |= states_[n] != Cover::kNone;
    }
    const FillKind kind = some ? static_cast<FillKind>(f_.kind[b]) : kZeros;
    write_clean(b, kind == kShuffle);
    if (!some) return;
    if (kind == kOther) return from_partner(b);
    if (kind == kShuffle) shuffle_.paint(f_, b);
    const Stream stream =
        kind == kNoise ? make_stream(f_.seed, f_.epoch, f_.image_ids[b], kNoiseStream | f_.view << 8)
                       : Stream{};
    for (int32_t n = 0; n < v_.patches(); ++n) {
      if (states_[n] == Cover::kNone) continue;
      if (kind == kZeros) {
        fill_zeros(b, n);
      } else if (kind == kNoise) {
        const int32_t ahead = Noise::ahead(n, v_.row_length());
        const uint8_t* const hidden = cover_.elements(b, n, ahead);
        const float* const values = noise_(stream, n, hidden, states_[n] == Cover::kAll);
        put(n, values + ahead, hidden + ahead);
      } else {
        shuffle_.take(n, values_);
        put(n, values_, cover_.elements(b, n, 0));
      }
    }
  }

 private:
  void write_clean(int64_t b, bool keep) {
    own_.open(b);
    for (int32_t row = 0, n = 0; row < v_.grid_h(); ++row) {
      for (int32_t j = 0; j < v_.grid_w(); ++j) {
        wanted_[j] = keep || states_[n + j] != Cover::kAll;
      }
      own_.row(row, wanted_);
      for (int32_t j = 0; j < v_.grid_w(); ++j, ++n) {
        if (keep) {
          own_.write(j, {TokenType::kFloat32}, values_);
          shuffle_.keep(n, values_);
        }
        if (states_[n] != Cover::kAll) own_.write(j, sink(n), token(n));
      }
    }
  }

  void from_partner(int64_t b) {
    partner_.open(f_.partner[b]);
    for (int32_t row = 0, n = 0; row < v_.grid_h(); ++row) {
      for (int32_t j = 0; j < v_.grid_w(); ++j) wanted_[j] = states_[n + j] != Cover::kNone;
      partner_.row(row, wanted_);
      for (int32_t j = 0; j < v_.grid_w(); ++j, ++n) {
        if (states_[n] == Cover::kAll) partner_.write(j, sink(n), token(n));
        if (states_[n] != Cover::kSome) continue;
        partner_.write(j, {TokenType::kFloat32}, values_);
        put(n, values_, cover_.elements(b, n, 0));
      }
    }
  }

  void fill_zeros(int64_t b, int32_t n) {
    if (states_[n] == Cover::kAll) {
      std::memset(token(n), 0, size_t(v_.row_length()) * token_size(sink_.type));
      return;
    }
    std::memset(values_, 0, size_t(v_.row_length()) * sizeof(float));
    put(n, values_, cover_.elements(b, n, 0));
  }

  void put(int32_t n, const float* values, const uint8_t* hidden) {
    if (states_[n] == Cover::kAll) {
      convert_to(sink(n), values, v_.row_length(), 1.0f, -0.0f, token(n));  // as they are
    } else {
      merge_to(sink_.type, values, hidden, v_.row_length(), token(n));
    }
  }

  // What is filled in part is read again at once.
  Sink sink(int32_t n) const {
    return {sink_.type, sink_.streamed && states_[n] != Cover::kSome};
  }

  uint8_t* token(int32_t n) const {
    return tokens_ + int64_t{n} * v_.row_length() * static_cast<int64_t>(token_size(sink_.type));
  }

  const Views& v_;
  const Fill& f_;
  Bench bench_;
  Patches own_, partner_;
  Cover cover_;
  Noise noise_;
  Shuffle shuffle_;
  float* values_;  // one patch
  Cover::State* states_;
  bool* wanted_;
  uint8_t* tokens_ = nullptr;
  Sink sink_{TokenType::kFloat32};
};

void masked_patch_gather(const Views& v, const Fill& f, int64_t begin, int64_t end, void* tokens,
                         TokenType type) {
  const bool shuffle = any_of(f, kShuffle, begin, end);
  Parts counted(nullptr);
  Gather(counted, v, f, shuffle);
  Parts parts(thread_scratch(counted.used()));
  Gather gather(parts, v, f, shuffle);
  const int64_t size = v.row_length() * int64_t(token_size(type)), image = v.patches() * size;
  const Sink sink{type, worth_streaming(tokens, size, v.count * image)};
  for (int64_t b = begin; b < end; ++b) {
    gather(b, static_cast<uint8_t*>(tokens) + b * image, sink);
  }
  if (sink.streamed) end_streaming();
}

void visible_patch_gather(const Views& v, const bool* mask, const int32_t* cu_seqlens,
                          int64_t begin, int64_t end, void* tokens, TokenType type, int32_t* ids) {
  struct Work {
    Bench bench;
    Patches own;
    bool* wanted;
    Work(Parts& parts, const Views& v)
        : bench(parts, v), own(parts, v, bench), wanted(parts.take<bool>(v.grid_w())) {}
  };
  Parts counted(nullptr);
  Work(counted, v);
  Parts parts(thread_scratch(counted.used()));
  Work work(parts, v);
  const int64_t size = v.row_length() * int64_t(token_size(type));
  const Sink sink{type, worth_streaming(tokens, size, cu_seqlens[v.count] * size)};
  for (int64_t b = begin; b < end; ++b) {
    const uint8_t* hidden = reinterpret_cast<const uint8_t*>(mask) + b * v.patches();  // see flag()
    int64_t at = cu_seqlens[b];
    work.own.open(b);
    for (int32_t row = 0, n = 0; row < v.grid_h(); ++row) {
      for (int32_t j = 0; j < v.grid_w(); ++j) work.wanted[j] = !hidden[n + j];
      work.own.row(row, work.wanted);
      for (int32_t j = 0; j < v.grid_w(); ++j, ++n) {
        if (hidden[n]) continue;
        work.own.write(j, sink, static_cast<uint8_t*>(tokens) + at * size);
        ids[at++] = n;
      }
    }
  }
  if (sink.streamed) end_streaming();
}

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr

#include "cpu/loss.h"

namespace spcxr {
namespace SPCXR_ISA {
const Kernels kernels{masked_patch_gather, visible_patch_gather, masked_reconstruction_loss,
                      reconstruction_gradient};
}
}  // namespace spcxr

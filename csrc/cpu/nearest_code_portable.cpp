// nearest_code on whatever the compiler targets by default.
#include "cpu/nearest_code.h"

namespace hitsr_fast::nearest::portable {
namespace {

constexpr int kPlainLanes = 4;
#include "cpu/plain_lanes.h"

struct Isa : PlainLanes {
  static constexpr int kRows = 4, kBlocks = 2, kRegisters = 16;
  static constexpr bool kPairs = false;
  using Codes = Scores;

  static int64_t list_at_most(const float* values, int64_t count, float limit, int* to) {
    return list<Isa>(values, count, limit, to);
  }
  static Codes load_codes(const uint32_t* from) {
    Codes codes;
    std::memcpy(&codes, from, sizeof codes);
    return codes;
  }
  static Codes spread(const uint32_t* from) {
    float value;
    std::memcpy(&value, from, sizeof value);
    return fill(value);
  }
  static Scores step(Scores scores, Codes x, Codes codes) { return scores + x * codes; }
};

}  // namespace
#include "cpu/nearest_code_vectors.h"
#include "cpu/nearest_code_vector_screen.h"
#include "cpu/nearest_code_search.h"
}  // namespace hitsr_fast::nearest::portable

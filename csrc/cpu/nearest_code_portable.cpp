// nearest_code on whatever the compiler targets by default.
#include "cpu/nearest_code.h"

namespace hitsr_fast::nearest::portable {
namespace {

constexpr int kPlainLanes = 4;
#include "cpu/plain_lanes.h"

struct Isa : PlainLanes {
  static constexpr int kRows = 4, kBlocks = 2;
  static constexpr bool kPairs = false;
  using Codes = Scores;

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
#include "cpu/nearest_code_search.h"
}  // namespace hitsr_fast::nearest::portable

// How the threads of a block share out channels: a group of min(C, 32) neighbours takes all channels of one place.
#pragma once

#include "arguments.h"

namespace hitsr_fast::residual {

template <int C>
struct Lanes {
  static constexpr int kGroup = C < block::kWarp ? C : block::kWarp;  // threads of a group
  static constexpr int kEach = C / kGroup;                            // channels of a thread: c, c + 32, ...
  static constexpr int kGroups = block::kWarp / kGroup;               // groups of a warp
  static constexpr int kPadded = C < 16 ? 16 : C;                       // channels of packed codes
  static_assert(C % kGroup == 0 && block::kWarp % kGroup == 0);
};

// What a block has of its image, and where; and the scale at hand, with the number of tokens before it.
struct Part {
  int image;
  int top, rows;         // of the map
  Scale scale;
  int start;
  float* residual;       // rows x W places of C + 1 floats, so that neither places nor channels share a bank
  float* reconstruction; // in global memory, rows x W places of C floats until `finish` turns it over
  int* tokens;           // in shared memory, all tokens of the scale
  const Taps* taps;      // of H rows, then of W columns
  unsigned char* work;   // of one stage at a time
};

}  // namespace hitsr_fast::residual

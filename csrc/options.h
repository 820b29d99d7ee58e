// The string arguments of the ops as enums. An unknown word returns false; `expected` then lists what it may be.
#pragma once

#include <string>

#include "cpu/kernels.h"

namespace gtp {

template <class T>
struct Choice {
  const char* name;
  T value;
};

template <class T, int N>
bool choose(const std::string& word, const Choice<T> (&choices)[N], T& value, std::string& expected) {
  for (const Choice<T>& choice : choices) {
    if (word == choice.name) {
      value = choice.value;
      return true;
    }
    expected += (expected.empty() ? "'" : ", '") + std::string(choice.name) + "'";
  }
  return false;
}

struct Importance {
  Source source;
  Aggregate aggregate;
};

inline bool parse(const std::string& word, Standard& value, std::string& expected) {
  static const Choice<Standard> choices[] = {
      {"None", Standard::None}, {"Mean", Standard::Mean}, {"GraphProp", Standard::GraphProp}};
  return choose(word, choices, value, expected);
}

inline bool parse(const std::string& word, Norm& value, std::string& expected) {
  static const Choice<Norm> choices[] = {{"none", Norm::None}, {"layer", Norm::Layer}, {"rms", Norm::Rms}};
  return choose(word, choices, value, expected);
}

inline bool parse(const std::string& word, GraphType& value, std::string& expected) {
  static const Choice<GraphType> choices[] = {
      {"Spatial", GraphType::Spatial}, {"Semantic", GraphType::Semantic}, {"Mixed", GraphType::Mixed}};
  return choose(word, choices, value, expected);
}

inline bool parse(const std::string& word, Importance& value, std::string& expected) {
  static const Choice<Importance> choices[] = {
      {"CLSAttnMean", {Source::Cls, Aggregate::Mean}},       {"CLSAttnMax", {Source::Cls, Aggregate::Max}},
      {"IMGAttnMean", {Source::Image, Aggregate::Mean}},     {"IMGAttnMax", {Source::Image, Aggregate::Max}},
      {"DiagAttnMean", {Source::Diagonal, Aggregate::Mean}}, {"DiagAttnMax", {Source::Diagonal, Aggregate::Max}},
      {"MixedAttnMean", {Source::Mixed, Aggregate::Mean}},   {"MixedAttnMax", {Source::Mixed, Aggregate::Max}},
      {"SumAttnMax", {Source::Sum, Aggregate::Max}}};
  return choose(word, choices, value, expected);
}

// `paper` for semantics, `by_index` for order.
inline bool parse_semantics(const std::string& word, bool& paper, std::string& expected) {
  static const Choice<bool> choices[] = {{"official", false}, {"paper", true}};
  return choose(word, choices, paper, expected);
}

inline bool parse_order(const std::string& word, bool& by_index, std::string& expected) {
  static const Choice<bool> choices[] = {{"importance", false}, {"grid", true}};
  return choose(word, choices, by_index, expected);
}

}  // namespace gtp

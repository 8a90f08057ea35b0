#pragma once

#include <array>
#include <stdexcept>
#include <string>
#include <string_view>

namespace moetuner {

/// What crosses the network for one token. Python's `moetuner.Wire` has the same names.
enum class Wire {
  kDedup,           // one row per distinct remote rank; between nodes one per distinct remote node
  kDedupPipelined,  // the same, but rows are passed on while others still cross between nodes
  kDedupRanks,      // one row per distinct remote rank, also between nodes
  kPerExpert,       // one row per (token, expert) on a remote rank
  kAllGather,       // every row goes to every rank, around a ring
};

/// Where a token's hidden state lives when a layer begins. Python's `moetuner.Homes`.
enum class Homes {
  kUniform,   // every rank equally likely, whatever the routing: exact expectation
  kRecorded,  // the trace has it
  kFollow,    // uniform at the first layer, then the rank of the token's first expert
};

/// Which rows a token sends.
enum class Rows {
  kPerRank,    // one to each distinct rank of its experts
  kPerExpert,  // one to each expert
  kToAll,      // one to every rank, whatever the placement
};

/// How rows reach another node.
enum class Crossing {
  kGateway,  // once per node, to the rank with the home's local index; from there inside the node
  kDirect,   // each straight to its rank
  kRing,     // from rank to next rank, the last one's next is the first, until all have it
};

/// What a direction takes whose rows use links inside nodes and between them.
enum class Hops {
  kTogether,  // all links are at work at once: the slower kind counts
  kInTurn,    // no row is passed on inside a node before all have crossed: both kinds count
};

/// All that the planner must know of a wire. Nothing else asks which wire it is.
struct WireRules {
  Rows rows;
  Crossing crossing;
  Hops hops = Hops::kTogether;

  /// Whether a token sends one row to each rank and to each node that it visits: a place costs what
  /// its set of tokens does.
  constexpr bool once_per_place() const {
    return rows == Rows::kPerRank && crossing == Crossing::kGateway;
  }

  /// Rows to all go around a ring and no others do; rows of experts cross directly; only a gateway
  /// passes rows on.
  constexpr bool known() const {
    if ((rows == Rows::kToAll) != (crossing == Crossing::kRing)) return false;
    if (hops == Hops::kInTurn && crossing != Crossing::kGateway) return false;
    return rows != Rows::kPerExpert || crossing == Crossing::kDirect;
  }
};

constexpr WireRules rules_of(Wire wire) {
  switch (wire) {
    case Wire::kDedup:
      return {Rows::kPerRank, Crossing::kGateway, Hops::kInTurn};
    case Wire::kDedupPipelined:
      return {Rows::kPerRank, Crossing::kGateway, Hops::kTogether};
    case Wire::kDedupRanks:
      return {Rows::kPerRank, Crossing::kDirect, Hops::kTogether};
    case Wire::kPerExpert:
      return {Rows::kPerExpert, Crossing::kDirect, Hops::kTogether};
    case Wire::kAllGather:
      return {Rows::kToAll, Crossing::kRing, Hops::kTogether};
  }
  throw std::invalid_argument("rules_of: no such wire");
}

constexpr std::string_view name_of(Wire wire) {
  switch (wire) {
    case Wire::kDedup:
      return "dedup";
    case Wire::kDedupPipelined:
      return "dedup_pipelined";
    case Wire::kDedupRanks:
      return "dedup_ranks";
    case Wire::kPerExpert:
      return "per_expert";
    case Wire::kAllGather:
      return "allgather";
  }
  throw std::invalid_argument("name_of: no such wire");
}

constexpr std::string_view name_of(Homes homes) {
  switch (homes) {
    case Homes::kUniform:
      return "uniform";
    case Homes::kRecorded:
      return "recorded";
    case Homes::kFollow:
      return "follow";
  }
  throw std::invalid_argument("name_of: no such homes");
}

/// Every member, in order.
template <typename Choice>
inline constexpr std::array<Choice, 0> kAll{};
template <>
inline constexpr std::array kAll<Wire>{
    Wire::kDedup, Wire::kDedupPipelined, Wire::kDedupRanks, Wire::kPerExpert, Wire::kAllGather};
template <>
inline constexpr std::array kAll<Homes>{Homes::kUniform, Homes::kRecorded, Homes::kFollow};

static_assert([] {
  for (const Wire wire : kAll<Wire>) {
    if (!rules_of(wire).known()) return false;
  }
  return true;
}());

/// The member of that name. Throws std::invalid_argument where there is none.
template <typename Choice>
Choice named(std::string_view name) {
  std::string wanted;
  for (const Choice choice : kAll<Choice>) {
    if (name_of(choice) == name) return choice;
    wanted += (wanted.empty() ? "" : ", ") + std::string(name_of(choice));
  }
  throw std::invalid_argument("wanted one of " + wanted + ", got " + std::string(name));
}

}  // namespace moetuner

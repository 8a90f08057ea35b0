#include "harness.h"
#include "moetuner/planning/replica_rule.h"
#include "moetuner/planning/wire.h"

using namespace moetuner;

static_assert(rules_of(Wire::kDedup).rows == Rows::kPerRank);
static_assert(rules_of(Wire::kDedup).crossing == Crossing::kGateway);
static_assert(rules_of(Wire::kDedup).hops == Hops::kInTurn);
static_assert(rules_of(Wire::kDedupPipelined).crossing == Crossing::kGateway);
static_assert(rules_of(Wire::kDedupPipelined).hops == Hops::kTogether);
static_assert(rules_of(Wire::kDedupRanks).rows == Rows::kPerRank);
static_assert(rules_of(Wire::kDedupRanks).crossing == Crossing::kDirect);
static_assert(rules_of(Wire::kPerExpert).crossing == Crossing::kDirect);
static_assert(rules_of(Wire::kAllGather).crossing == Crossing::kRing);
static_assert(!WireRules{Rows::kToAll, Crossing::kGateway}.known());
static_assert(!WireRules{Rows::kPerRank, Crossing::kRing}.known());
static_assert(!WireRules{Rows::kPerRank, Crossing::kDirect, Hops::kInTurn}.known());

TEST(every_member_is_found_by_its_name) {
  for (const Wire wire : kAll<Wire>) CHECK(named<Wire>(name_of(wire)) == wire);
  for (const Homes homes : kAll<Homes>) CHECK(named<Homes>(name_of(homes)) == homes);
  for (const ReplicaRule rule : kAll<ReplicaRule>) {
    CHECK(named<ReplicaRule>(name_of(rule)) == rule);
  }
}

TEST(another_name_is_refused) {
  CHECK_THROWS(named<Wire>("uniform"), std::invalid_argument);
  CHECK_THROWS(named<Homes>(""), std::invalid_argument);
}

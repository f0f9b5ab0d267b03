// Which tokens go to which expert, turned around: the (token, choice) pairs of each expert, side by side.
#pragma once

#include <cstring>

#include "linear.h"

// What an expert_linear step says beside its Linear.
struct ExpertStep {
    int tokens, experts, top_k;
    bool x_per_choice;  // x has a part for each choice
    int first_expert;   // ids outside the `experts` from here on are other ranks', and give zeros
    const int32_t* ids;

    ExpertStep(const tl_step& s, int tokens)
        : tokens(tokens), experts(s.i[9]), top_k(s.i[10]), x_per_choice(s.i[11]), first_expert(s.i[12]),
          ids((const int32_t*)s.p[5]) {}

    int pairs() const { return tokens * top_k; }
    // The expert of a pair, counted from 0; at least `experts` where it is another rank's.
    uint32_t expert_of(int pair) const { return (uint32_t)ids[pair] - (uint32_t)first_expert; }
    int most_active() const { return pairs() < experts ? pairs() : experts; }
    // Rows that are multiplied at a time.
    int most_rows() const { return pairs() < kRowGroup ? pairs() : kRowGroup; }
    // Whether grouping takes less time than waiting for another thread to do it.
    bool alone() const { return pairs() <= 64; }
    size_t group_bytes() const { return round_up(sizeof(int32_t) * (3 * experts + 2 + pairs()), 64); }
};

// Lies in `memory` of step.group_bytes().
struct ExpertGroups {
    int32_t *count, *expert, *start, *next, *pairs;

    ExpertGroups(const ExpertStep& s, int32_t* memory)
        : count(memory), expert(memory + 1), start(expert + s.experts), next(start + s.experts + 1),
          pairs(next + s.experts) {}

    int active() const { return *count; }

    // Experts that have pairs, in order: group i is `expert[i]`, its pairs [start[i], start[i + 1]) in order of tokens.
    // Behind the last group's are the pairs of other ranks' experts.
    void find(const ExpertStep& s) {
        const uint32_t experts = s.experts;
        memset(next, 0, experts * sizeof(int32_t));
        for (int p = 0; p < s.pairs(); p++)
            if (s.expert_of(p) < experts) next[s.expert_of(p)]++;
        int32_t found = 0, total = 0;
        for (int e = 0; e < s.experts; e++) {
            if (!next[e]) continue;
            expert[found] = e, start[found++] = total;
            total += next[e], next[e] = total - next[e];
        }
        start[found] = total, *count = found;
        for (int p = 0; p < s.pairs(); p++) pairs[s.expert_of(p) < experts ? next[s.expert_of(p)]++ : total++] = p;
    }
};

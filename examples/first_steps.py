"""First steps, as in a notebook: load, capture, two questions, a report.

python examples/first_steps.py [RUN]
"""

import sys

import moescope
from moescope.corpora.packing import Packing

run = sys.argv[1] if len(sys.argv) > 1 else "first-steps"

model = moescope.load("tiny")
print(moescope.inspect(model).to_string(index=False))

corpus = moescope.Corpus.builtin(Packing(max_tokens=40_000))
print(moescope.capture(model, corpus, run, tokens=4_096, tokens_per_expert=1_000))

routing = moescope.routing(run, model=model, permutations=200)
print(routing.findings[1].text)

# Expert 0 of layer 1, imitated by experts 0 and 1 of layer 2.
alignment = moescope.align(
    run, model=model, source=1, target=2, source_experts=(0,), target_experts=(0, 1)
)
print(alignment.table[["target_expert", "fvu", "fvu_linear", "fvu_random", "score", "status"]])

print(moescope.report(run))

"""What the rewardbench package makes of made-up results: rewardbench_official.json, read by tests/test_benchmarks.py.

    pip download --no-deps --no-binary :all: rewardbench==0.1.4 && tar xzf rewardbench-0.1.4.tar.gz
    python tests/rewardbench_official.py rewardbench-0.1.4 > tests/rewardbench_official.json

The package pins an old transformers and imports clients of many services, so its constants and its scoring function
run alone, the function cut out of its file.
"""
import ast
import json
import random
import sys
from pathlib import Path

package, official = Path(sys.argv[1]) / "rewardbench", {}
exec((package / "constants.py").read_text(), official)
function = next(part for part in ast.parse((package / "utils.py").read_text()).body
                if getattr(part, "name", "") == "calculate_scores_per_section")
exec(ast.unparse(function), official)

rng = random.Random(0)
pairs = []
for subset in official["EXAMPLE_COUNTS"]:
    pairs += [[subset, rng.choice((0, 0.5, 1, 1))] for _ in range(rng.randint(2, 9))]
subsets = {}
for subset in official["EXAMPLE_COUNTS"]:  # as in its scripts/run_generative.py
    results = [result for name, result in pairs if name == subset]
    subsets[subset] = sum(results) / len(results)
sections = official["calculate_scores_per_section"](official["EXAMPLE_COUNTS"], official["SUBSET_MAPPING"], subsets)
print(json.dumps({"mapping": official["SUBSET_MAPPING"], "weights": official["EXAMPLE_COUNTS"], "pairs": pairs,
                  "subsets": subsets, "sections": sections}))

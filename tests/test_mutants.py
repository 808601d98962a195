"""Files damaged at random: values or a sentence, and nothing else."""

from benchmarks import mutate_files


def test_the_first_mutants(capsys):
  ends = mutate_files.run(200, seconds=200, seed=0)
  fine = mutate_files.report(ends)
  assert len(ends) == 200 and fine, capsys.readouterr().out

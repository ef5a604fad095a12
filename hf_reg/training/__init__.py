"""What stands behind `RegularizedTrainer`: arguments, the exact task loss, penalties as terms, teachers, refusals."""

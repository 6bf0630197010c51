from llm_distill.cli import main

main()

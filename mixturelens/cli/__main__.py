from mixturelens.cli import main

main()

from gtp_vit.cli import main

main()

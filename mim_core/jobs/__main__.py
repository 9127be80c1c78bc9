from mim_core.jobs import main

if __name__ == "__main__":
    main()

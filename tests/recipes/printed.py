"""The tables of the paper (arXiv 2106.09685v2) as they are printed: what the rows' files are checked against.

First the file of a row; then, in the columns of the table, the trainable parameters where the table has them, and the
scores. Cells are apart by blanks, and a ± stands with its score.
"""

GLUE = ("mnli", "sst-2", "mrpc", "cola", "qnli", "qqp", "rte", "sts-b")  # the columns of Table 2

TABLES = {
    2: """
        roberta-base-full             125.0M 87.6 94.8 90.2 63.6 92.8 91.9 78.7 91.2 86.4
        roberta-base-bitfit           0.1M 84.7 93.7 92.7 62.0 91.8 84.0 81.5 90.8 85.2
        roberta-base-adapter-d-0.3m   0.3M 87.1±.0 94.2±.1 88.5±1.1 60.8±.4 93.1±.1 90.2±.0 71.5±2.7 89.7±.3 84.4
        roberta-base-adapter-d-0.9m   0.9M 87.3±.1 94.7±.3 88.4±.1 62.6±.9 93.0±.2 90.6±.0 75.9±2.2 90.3±.1 85.4
        roberta-base-lora             0.3M 87.5±.3 95.1±.2 89.7±.7 63.4±1.2 93.3±.3 90.8±.1 86.6±.7 91.5±.2 87.2
        roberta-large-full            355.0M 90.2 96.4 90.9 68.0 94.7 92.2 86.6 92.4 88.9
        roberta-large-lora            0.8M 90.6±.2 96.2±.5 90.9±1.2 68.2±1.9 94.9±.3 91.6±.1 87.4±2.5 92.6±.2 89.0
        roberta-large-adapter-p-3m    3.0M 90.2±.3 96.1±.3 90.2±.7 68.3±1.0 94.8±.2 91.9±.1 83.8±2.9 92.1±.7 88.4
        roberta-large-adapter-p-0.8m  0.8M 90.5±.3 96.6±.2 89.7±1.2 67.8±2.5 94.8±.3 91.7±.2 80.1±2.9 91.9±.4 87.9
        roberta-large-adapter-h-6m    6.0M 89.9±.5 96.2±.3 88.7±2.9 66.5±4.4 94.7±.2 92.1±.1 83.4±1.1 91.0±1.7 87.8
        roberta-large-adapter-h-0.8m  0.8M 90.3±.3 96.3±.5 87.7±1.7 66.3±2.0 94.7±.2 91.5±.1 72.9±2.9 91.5±.5 86.4
        roberta-large-lora-restricted 0.8M 90.6±.2 96.2±.5 90.2±1.0 68.2±1.9 94.8±.3 91.6±.2 85.2±1.1 92.3±.5 88.6
        deberta-xxl-full              1500.0M 91.8 97.2 92.0 72.0 96.0 92.7 93.9 92.9 91.1
        deberta-xxl-lora              4.7M 91.9±.2 96.9±.2 92.6±.6 72.4±1.1 96.0±.1 92.9±.1 94.9±.4 93.0±.2 91.3
    """,
    3: """
        gpt2-medium-full              354.92M 68.2 8.62 46.2 71.0 2.47
        gpt2-medium-adapter-l-0.37m   0.37M 66.3 8.41 45.0 69.8 2.40
        gpt2-medium-adapter-l-11m     11.09M 68.9 8.71 46.1 71.3 2.47
        gpt2-medium-adapter-h-11m     11.09M 67.3±.6 8.50±.07 46.0±.2 70.7±.2 2.44±.01
        gpt2-medium-top-2             25.19M 68.1 8.59 46.0 70.8 2.41
        gpt2-medium-prefix-layer      0.35M 69.7 8.81 46.1 71.4 2.49
        gpt2-medium-lora              0.35M 70.4±.1 8.85±.02 46.8±.2 71.8±.1 2.53±.02
        gpt2-large-full               774.03M 68.5 8.78 46.0 69.9 2.45
        gpt2-large-adapter-l-0.88m    0.88M 69.1±.1 8.68±.03 46.3±.0 71.4±.2 2.49±.0
        gpt2-large-adapter-l-23m      23.00M 68.9±.3 8.70±.04 46.1±.1 71.3±.2 2.45±.02
        gpt2-large-prefix-layer       0.77M 70.3 8.85 46.2 71.7 2.47
        gpt2-large-lora               0.77M 70.4±.1 8.89±.02 46.8±.2 72.0±.2 2.47±.02
    """,
    4: """
        gpt3-full                     175,255.8M 73.8 89.5 52.0/28.0/44.5
        gpt3-bitfit                   14.2M 71.3 91.0 51.3/27.4/43.5
        gpt3-prefix-embedding         3.2M 63.1 88.6 48.3/24.2/40.5
        gpt3-prefix-layer             20.2M 70.1 89.5 50.8/27.3/43.5
        gpt3-adapter-h-7.1m           7.1M 71.9 89.8 53.0/28.9/44.8
        gpt3-adapter-h-40.1m          40.1M 73.2 91.5 53.2/29.0/45.1
        gpt3-lora-4.7m                4.7M 73.4 91.7 53.8/29.8/45.9
        gpt3-lora-37.7m               37.7M 74.0 91.6 53.4/29.2/45.1
    """,
    13: """
        gpt2-medium-full              354M 46.2 0.39 0.46
        gpt2-medium-adapter-l-0.37m   0.37M 42.4 0.36 0.48
        gpt2-medium-adapter-l-11m     11M 45.2 0.38 0.46
        gpt2-medium-top-2             24M 41.0 0.34 0.56
        gpt2-medium-prefix-layer      0.35M 46.4 0.38 0.46
        gpt2-medium-lora              0.35M 47.1±.2 0.39 0.46
        gpt2-large-full               774M 47.0 0.39 0.46
        gpt2-large-adapter-l-0.88m    0.88M 45.7±.1 0.38 0.46
        gpt2-large-adapter-l-23m      23M 47.1±.1 0.39 0.45
        gpt2-large-prefix-layer       0.77M 46.7 0.38 0.45
        gpt2-large-lora               0.77M 47.5±.1 0.39 0.45
    """,
    14: """
        gpt2-medium-full              354M 27.7/64.2/46.5 .30/.45/.38 .76/.33/.53
        gpt2-medium-adapter-l-0.37m   0.37M 45.1/54.5/50.2 .36/.39/.38 .46/.40/.43
        gpt2-medium-adapter-l-11m     11M 48.3/60.4/54.9 .38/.43/.41 .45/.35/.39
        gpt2-medium-top-2             24M 18.9/53.6/36.0 .23/.38/.31 .99/.49/.72
        gpt2-medium-prefix-layer      0.35M 45.6/62.9/55.1 .38/.44/.41 .49/.35/.40
        gpt2-medium-lora              0.35M 46.7±.4/62.1±.2/55.3±.2 .38/.44/.41 .46/.33/.39
        gpt2-large-full               774M 43.1/65.3/55.5 .38/.46/.42 .53/.33/.42
        gpt2-large-adapter-l-0.88m    0.88M 49.8±.0/61.1±.0/56.0±.0 .38/.43/.41 .44/.35/.39
        gpt2-large-adapter-l-23m      23M 49.2±.1/64.7±.2/57.7±.1 .39/.46/.43 .46/.33/.39
        gpt2-large-prefix-layer       0.77M 47.7/63.4/56.3 .39/.45/.42 .48/.34/.40
        gpt2-large-lora               0.77M 48.4±.3/64.0±.3/57.0±.1 .39/.45/.42 .45/.32/.38
    """,
    16: """
        gpt3-full                     60.2 85.8 88.9 89.5
        gpt3-prefix-embedding         37.6 75.2 79.5 88.6
        gpt3-prefix-layer             48.3 82.5 85.9 89.6
        gpt3-lora                     63.8 85.6 89.2 91.7
    """,
}

# Tables 9 and 10, in the order of the tasks in Table 2; a single value is that of all tasks.
HYPERPARAMETERS = {
    "roberta-base-lora": {
        "batch_size": "16 16 16 32 32 16 32 16",
        "epochs": "30 60 30 80 25 25 80 40",
        "learning_rate": "5e-4 5e-4 4e-4 4e-4 4e-4 5e-4 5e-4 4e-4",
        "max_length": "512",
    },
    "roberta-large-lora": {
        "batch_size": "4 4 4 4 4 4 8 8",
        "epochs": "10 10 20 20 10 20 20 30",
        "learning_rate": "3e-4 4e-4 3e-4 2e-4 2e-4 3e-4 4e-4 2e-4",
        "max_length": "128 128 512 128 512 512 512 512",
    },
    "roberta-large-lora-restricted": {
        "batch_size": "4",
        "epochs": "10 10 20 20 10 20 20 10",
        "learning_rate": "3e-4 4e-4 3e-4 2e-4 2e-4 3e-4 4e-4 2e-4",
        "max_length": "128",
    },
    "roberta-large-adapter-p-3m": {
        "batch_size": "32",
        "epochs": "10 20 20 20 10 20 20 20",
        "learning_rate": "3e-5 3e-5 3e-4 3e-4 3e-4 3e-4 3e-4 3e-4",
        "max_length": "128",
    },
    "roberta-large-adapter-p-0.8m": {
        "batch_size": "32",
        "epochs": "5 20 20 20 10 20 20 20",
        "learning_rate": "3e-4",
        "max_length": "128",
    },
    "roberta-large-adapter-h-6m": {
        "batch_size": "32",
        "epochs": "10 5 10 10 5 20 20 10",
        "learning_rate": "3e-5 3e-4 3e-4 3e-4 3e-4 3e-4 3e-4 3e-4",
        "max_length": "128",
    },
    "roberta-large-adapter-h-0.8m": {
        "batch_size": "32",
        "epochs": "10 5 10 10 5 20 20 10",
        "learning_rate": "3e-4",
        "max_length": "128",
    },
    "deberta-xxl-lora": {
        "batch_size": "8 8 32 4 6 8 4 4",
        "epochs": "5 16 30 10 8 11 11 10",
        "learning_rate": "1e-4 6e-5 2e-4 1e-4 1e-4 1e-4 2e-4 2e-4",
        "max_length": "256 128 128 64 512 320 320 128",
    },
}


# Trainable parameters as they follow from the architectures, without a classifier's head.
COUNTED = {
    "roberta-base-full": 124_055_040,  # the encoder; the table's 125.0M is nominal, as 355.0M and 1500.0M are
    "roberta-base-bitfit": 102_144,
    "roberta-base-adapter-d-0.3m": 304_320,
    "roberta-base-adapter-d-0.9m": 894_528,
    "roberta-base-lora": 294_912,
    "roberta-large-full": 354_310_144,
    "roberta-large-lora": 786_432,
    "roberta-large-adapter-p-3m": 3_171_840,
    "roberta-large-adapter-p-0.8m": 811_392,
    "roberta-large-adapter-h-6m": 6_343_680,
    "roberta-large-adapter-h-0.8m": 835_968,
    "roberta-large-lora-restricted": 786_432,
    "deberta-xxl-full": 1_564_549_632,
    "deberta-xxl-lora": 2_359_296,  # with Table 10's r = 8
    "gpt2-medium-full": 354_823_168,
    "gpt2-medium-adapter-l-0.37m": 368_784,
    "gpt2-medium-adapter-l-11m": 11_089_152,
    "gpt2-medium-adapter-h-11m": 11_064_576,
    "gpt2-medium-top-2": 25_192_448,
    "gpt2-medium-prefix-layer": 368_640,
    "gpt2-medium-lora": 393_216,
    "gpt2-large-full": 774_030_080,
    "gpt2-large-adapter-l-0.88m": 875_808,
    "gpt2-large-adapter-l-23m": 23_002_848,
    "gpt2-large-prefix-layer": 783_360,
    "gpt2-large-lora": 737_280,
    "gpt3-full": 174_604_259_328,
    "gpt3-bitfit": 12_988_416,
    "gpt3-prefix-embedding": 3_244_032,  # in Table 16 of the last task alone
    "gpt3-prefix-layer": 18_874_368,
    "gpt3-adapter-h-7.1m": 7_078_080,
    "gpt3-adapter-h-40.1m": 40_109_568,
    "gpt3-lora-4.7m": 4_718_592,
    "gpt3-lora-37.7m": 37_748_736,
    "gpt3-lora": 37_748_736,
}
IN_THE_CODE = {"deberta-xxl-lora": 4_718_592}  # with the repository's hyperparameters, where these count otherwise

"""Every figure of the evaluation of a bundle: its unit, and what it is."""

from __future__ import annotations

from anygen.evaluation.report import Explained

EXPLAINED: Explained = {
    "nearest by pixels": (
        "%",
        "Of all real emoji the one with the smallest mean squared pixel error is the right one.",
    ),
    "nearest by edges and colours": (
        "%",
        "The same by oriented gradients and mean colours (scikit-image; no learned weights, no part in any training).",
    ),
    "SSIM": ("", "Structural similarity to the real picture, 1 where they are equal (Wang et al. 2004, scikit-image)."),
    "code agreement": ("%", "Codes that are those of the real picture, place by place."),
    "FID, edges and colours": (
        "",
        "Fréchet distance (FID's formula) to the real pictures in 32 components of edges and colours; not Inception's.",
    ),
    "KID, edges and colours": ("", "Kernel distance (KID's formula) in the same space; around 0 where sets are alike."),
    "exact caption": ("%", "The text is one of the right captions, in any phrasing."),
    "another phrasing": ("%", "The text is right, and not the given one."),
    "CIDEr-D": (
        "",
        "arXiv 1411.5726, 0 to 10, against all phrasings; what the plain phrase itself gets stands beside it.",
    ),
    "word error rate": ("%", "Word errors over words (jiwer), case and punctuation apart."),
    "character error rate": ("%", "Character errors over characters (jiwer)."),
    "exact words": ("%", "Every word is right."),
    "word error rate, recogniser": (
        "%",
        "Of what pocketsphinx hears, listening for 500 texts, the right ones among them; texts that its dictionary "
        "lacks are left out.",
    ),
    "exact words, recogniser": ("%", "The same, every word."),
    "word error rate, own transcript": ("%", "Of what the model itself writes down of what it said."),
    "distance to a recording": (
        "dB",
        "Mean difference of log-mel spectra, aligned in time, to a recording of the right words (of several phrasings "
        "the nearest) in the voice that it is most like.",
    ),
    "speaker similarity": (
        "",
        "Cosine of mel cepstra's statistics to those of the training voice that it is most like, -1 to 1.",
    ),
    "STOI": ("", "Short-time objective intelligibility, 0 to 1 (pystoi)."),
    "ESTOI": ("", "Extended STOI, stricter (pystoi)."),
    "PESQ": ("MOS", "ITU-T P.862: noise 1.0, best 4.6."),
    "SI-SDR": ("dB", "Scale-invariant signal to distortion ratio."),
    "mel distance": ("", "Mean absolute difference of log-mel spectrograms at six window sizes."),
    "count": ("%", "As many things are read from the picture as were asked for."),
    "things": ("%", "The right things, each as often as asked for, are read from the picture."),
    "position": ("%", "The two kinds of things stand left and right, or above and below, as asked for."),
    "exact answer": ("%", "The answer is the right one, word by word."),
    "exact answer, recogniser": ("%", "The same, as pocketsphinx hears it, listening for every possible answer."),
    "mean IoU": ("", "Intersection over union of the answered and the right box."),
    "IoU of a half or more": ("%", "Boxes that overlap by a half or more."),
    "bits per id, text": ("bits", "Of the right answer by teacher forcing: -log2 p of each id, over the vocabulary."),
    "bits per id, image": ("bits", "The same of picture codes, over their codebook, as in sampling."),
    "bits per id, audio": ("bits", "The same of sound codes."),
    "bits per id, region": ("bits", "The same of location bins."),
    "seconds per sample": (
        "s",
        "Of generation, in batches of 48, inputs encoded and answers decoded; on this machine.",
    ),
}

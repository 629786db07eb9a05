"""The models of `zoo_capture.py`: their names, and how each is built without its weights.

A word of a list is a name, or `name@size` for images that are not of the library's usual size. The
first of each list is its smallest; `--tiny` runs these. No library is imported before one of its
models is built."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...]]


def of(name: str, **config: Any) -> Any:
    """The attribute of a module, `package.module:attribute`, called if there is a configuration."""
    module, _, attribute = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found(**config) if config else found


TIMM = """
resnet18 test_resnet resnet26d resnet50 resnet14t resnetaa34d resnetblur18 seresnet18 ecaresnet26t
seresnext26t_32x4d resnetv2_18 resnetv2_50x1_bit resnetv2_50d_evos resnetv2_50d_frn
legacy_seresnet18 legacy_seresnext26_32x4d skresnet18 skresnext50_32x4d resnest14d resnest26d
res2net50_14w_8s res2next50 densenet121 densenetblur121d dpn48b dpn68 dla34 dla46x_c dla60_res2net
cspresnet50 cspdarknet53 cs3darknet_s cs3sedarknet_xdw cs3edgenet_x cspnext_tiny vgg11_bn vgg11
vovnet39a ese_vovnet19b_dw ese_vovnet39b_evos selecsls42b hrnet_w18_small inception_v3
inception_v4 inception_resnet_v2 xception legacy_xception xception41 rdnet_tiny tresnet_m
repvgg_a0 repvgg_b1g4 mobileone_s0 gernet_s bat_resnext26ts@256 gcresnext26ts regnetz_b16
resnet50_clip resnet51q halonet_h1@256 lambda_resnet26t@256 botnet26t_256 test_byobnet regnetx_002
regnety_002 regnetz_005 regnetv_040 regnety_040_sgn efficientnet_b0 tf_efficientnet_b0
test_efficientnet test_efficientnet_ln efficientnet_lite0 efficientnet_es efficientnet_blur_b0
efficientnetv2_rw_t tf_efficientnetv2_b0 efficientnet_cc_b0_4e mobilenetv1_100 mobilenetv2_035
mobilenet_edgetpu_100 mnasnet_small tinynet_e fbnetc_100 spnasnet_100 mixnet_s
mobilenetv3_small_050 mobilenetv3_rw tf_mobilenetv3_small_100 fbnetv3_b lcnet_035
mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium_075 mobilenetv4_conv_blur_medium
lcnetv2_small hardcorenas_a ghostnet_050 ghostnetv2_100 ghostnetv3_050 repghostnet_050 rexnet_100
rexnetr_100 hgnet_tiny hgnetv2_b0 starnet_s050 fasternet_t0 shvit_s1 iformer_t repvit_m1
repvit_m0_9 fastvit_t8 fastvit_sa12 fastvit_mci0 inception_next_atto convnext_atto convnextv2_atto
convnext_zepto_rms convmixer_768_32 edgenext_xx_small edgenext_small_rw efficientformer_l1
efficientformerv2_s0 efficientvit_b0 efficientvit_b1 efficientvit_l1 efficientvit_m0
efficientvim_m1 lowformer_b0 cpubone_nano csatv2 mambaout_femto mobilevit_xxs mobilevitv2_050
poolformer_s12 poolformerv2_s12 convformer_s18 caformer_s18 nf_resnet26 nfnet_l0 eca_nfnet_l0
nf_regnet_b0 nextvit_small pvt_v2_b0 pvt_v2_b2_li tiny_vit_5m_224 swiftformer_xs visformer_tiny
levit_128s levit_conv_128s test_coatnet test_maxvit coatnet_bn_0_rw_224 maxvit_rmlp_pico_rw_256
coatnext_nano_rw_224 coat_lite_tiny crossvit_9_240 convit_tiny cait_xxs24_224 davit_tiny@224
focalnet_tiny_srf@224 gcvit_xxtiny hiera_tiny_224 mvitv2_tiny nest_tiny pit_ti_224 sequencer2d_s
swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224
tnt_s_patch16_224 twins_svt_small twins_pcpvt_small vitamin_small_224 volo_d1_224
xcit_nano_12_p16_224 resmlp_12_224 gmlp_ti16_224 vit_tiny_patch16_224 test_vit
vit_tiny_r_s16_p8_224 vit_small_resnet50d_s16_224 vit_relpos_small_patch16_224
deit_tiny_patch16_224 eva02_tiny_patch14_224 flexivit_small
"""

TORCHVISION = """
mnasnet0_5 alexnet resnet18 resnet50 resnext50_32x4d wide_resnet50_2 vgg11 vgg11_bn squeezenet1_0
squeezenet1_1 densenet121 googlenet inception_v3 mobilenet_v2 mobilenet_v3_small
mobilenet_v3_large shufflenet_v2_x0_5 shufflenet_v2_x1_0 mnasnet1_0 efficientnet_b0
efficientnet_v2_s regnet_x_400mf regnet_y_400mf convnext_tiny maxvit_t@224 swin_t@224
swin_v2_t@256 vit_b_32@224 fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large
lraspp_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_resnet50_fpn
fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn retinanet_resnet50_fpn retinanet_resnet50_fpn_v2
ssd300_vgg16 ssdlite320_mobilenet_v3_large maskrcnn_resnet50_fpn keypointrcnn_resnet50_fpn r3d_18
mc3_18 r2plus1d_18 s3d raft_small@128
"""

ULTRALYTICS = """
yolov8n yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-cls yolov8n-p2 yolov8n-p6 yolov8n-ghost
yolov8n-ghost-p2 yolov8n-rtdetr yolov8n-world yolov8n-worldv2 yolov8n-seg-p6 yolov8n-pose-p6
yolov8n-cls-resnet50 yolov3 yolov3-spp yolov3-tiny yolov5n yolov5n-p6 yolov6n yolov9t yolov9s
yolov9c-seg yolov10n yolov10s yolo11n yolo11n-seg yolo11n-pose yolo11n-obb yolo11n-cls yolo12n
yolo12n-seg yolo12n-pose yolo12n-obb yolo12n-cls yolo26n yolo26n-seg yolo26n-pose yolo26n-obb
yolo26n-cls yolo26n-p2 yolo26n-p6 yolo26n-sem yolo26n-depth yoloe-v8n yoloe-11n-seg yoloe-26n
rtdetr-l rtdetr-resnet50
"""

# Class, options of its configuration, size of the image.
SMALL_DETR = {
    **{"use_pretrained_backbone": False, "num_queries": 20, "d_model": 64},
    **{"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
}
SMALL_RT = {"num_queries": 30, "decoder_layers": 2, "num_denoising": 0}
SMALL_VIT = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 128, "image_size": 64, "patch_size": 16},
}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "resnet": ("ResNetForImageClassification", {"depths": [2, 2, 2, 2]}, 96),
    "resnet_basic": (
        "ResNetForImageClassification",
        {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]},
        96,
    ),
    "resnet_backbone": ("ResNetBackbone", {"out_features": ["stage2", "stage4"]}, 96),
    "regnet": ("RegNetForImageClassification", {"depths": [1, 1, 2, 1]}, 96),
    "regnet_x": ("RegNetForImageClassification", {"depths": [1, 1, 2, 1], "layer_type": "x"}, 96),
    "mobilenet_v1": ("MobileNetV1ForImageClassification", {}, 96),
    "mobilenet_v1_tf_padding_off": (
        "MobileNetV1ForImageClassification",
        {"tf_padding": False},
        96,
    ),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", {}, 96),
    "mobilenet_v2_segmentation": ("MobileNetV2ForSemanticSegmentation", {}, 96),
    "mobilevit": ("MobileViTForImageClassification", {}, 64),
    "mobilevit_segmentation": ("MobileViTForSemanticSegmentation", {}, 64),
    "mobilevitv2": ("MobileViTV2ForImageClassification", {}, 64),
    "mobilevitv2_segmentation": ("MobileViTV2ForSemanticSegmentation", {}, 64),
    "convnext": ("ConvNextForImageClassification", {"depths": [1, 1, 2, 1]}, 96),
    "convnextv2": ("ConvNextV2ForImageClassification", {"depths": [1, 1, 2, 1]}, 96),
    "dinov3_convnext": ("DINOv3ConvNextModel", {"depths": [1, 1, 2, 1]}, 96),
    "efficientnet": (
        "EfficientNetForImageClassification",
        {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
        96,
    ),
    "bit": ("BitForImageClassification", {"depths": [1, 1, 1, 1]}, 96),
    "bit_backbone": ("BitBackbone", {"depths": [1, 1, 1, 1]}, 96),
    "levit": ("LevitForImageClassification", {"depths": [2, 2, 2]}, 224),
    "levit_teacher": ("LevitForImageClassificationWithTeacher", {"depths": [2, 2, 2]}, 224),
    "swiftformer": ("SwiftFormerForImageClassification", {}, 96),
    "poolformer": ("PoolFormerForImageClassification", {}, 96),
    "pvt": ("PvtForImageClassification", {"depths": [1, 1, 1, 1]}, 224),
    "pvt_v2": ("PvtV2ForImageClassification", {}, 96),
    "cvt": ("CvtForImageClassification", {}, 96),
    "focalnet": ("FocalNetForImageClassification", {"depths": [1, 1, 2, 1]}, 224),
    "hgnet_v2": ("HGNetV2ForImageClassification", {}, 96),
    "textnet": ("TextNetForImageClassification", {}, 96),
    "textnet_backbone": ("TextNetBackbone", {}, 96),
    "pp_lcnet": ("PPLCNetForImageClassification", {}, 96),
    "pp_ocrv5_mobile_det": ("PPOCRV5MobileDetForObjectDetection", {}, 96),
    "swin": ("SwinForImageClassification", {"depths": [1, 1, 2, 1]}, 224),
    "swinv2": ("Swinv2ForImageClassification", {"depths": [1, 1, 2, 1]}, 224),
    "swin_backbone": ("SwinBackbone", {"depths": [1, 1, 2, 1]}, 224),
    "swin2sr": (
        "Swin2SRForImageSuperResolution",
        {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 32, "image_size": 64},
        64,
    ),
    "vit": ("ViTForImageClassification", SMALL_VIT, 64),
    "deit": ("DeiTForImageClassification", SMALL_VIT, 64),
    "beit": ("BeitForImageClassification", SMALL_VIT, 64),
    "dinov2": ("Dinov2ForImageClassification", SMALL_VIT, 64),
    "hiera": ("HieraForImageClassification", {}, 224),
    "segformer": ("SegformerForImageClassification", {}, 96),
    "segformer_segmentation": ("SegformerForSemanticSegmentation", {}, 96),
    "upernet": (
        "UperNetForSemanticSegmentation",
        {"use_pretrained_backbone": False, "hidden_size": 64, "auxiliary_in_channels": 1024},
        96,
    ),
    "dpt": (
        "DPTForDepthEstimation",
        {
            **SMALL_VIT,
            "backbone_out_indices": [0, 1, 2, 3],
            "num_hidden_layers": 4,
            "is_hybrid": False,
            "neck_hidden_sizes": [16, 32, 64, 64],
            "fusion_hidden_size": 32,
        },
        64,
    ),
    "glpn": ("GLPNForDepthEstimation", {}, 96),
    "depth_anything": ("DepthAnythingForDepthEstimation", {}, 70),
    "detr": ("DetrForObjectDetection", SMALL_DETR, 128),
    "conditional_detr": ("ConditionalDetrForObjectDetection", SMALL_DETR, 128),
    "dab_detr": (
        "DabDetrForObjectDetection",
        {
            **{"use_pretrained_backbone": False, "num_queries": 20, "hidden_size": 64},
            **{"encoder_layers": 2, "decoder_layers": 2},
        },
        128,
    ),
    "deformable_detr": ("DeformableDetrForObjectDetection", SMALL_DETR, 128),
    "table_transformer": ("TableTransformerForObjectDetection", SMALL_DETR, 128),
    "yolos": ("YolosForObjectDetection", {**SMALL_VIT, "image_size": [64, 64]}, 64),
    "rt_detr": ("RTDetrForObjectDetection", SMALL_RT, 128),
    "rt_detr_v2": ("RTDetrV2ForObjectDetection", SMALL_RT, 128),
    "rt_detr_resnet": ("RTDetrResNetBackbone", {}, 96),
    "d_fine": ("DFineForObjectDetection", SMALL_RT, 128),
    "deimv2": ("Deimv2ForObjectDetection", {"num_queries": 30, "num_denoising": 0}, 128),
    "superpoint": ("SuperPointForKeypointDetection", {}, 64),
    "mask2former": ("Mask2FormerForUniversalSegmentation", {}, 64),
}

SMP_DECODERS = """
Unet UnetPlusPlus FPN PAN@128 Linknet MAnet PSPNet DeepLabV3 DeepLabV3Plus UPerNet
"""
SMP_OTHERS = """
Segformer/resnet18 Segformer/mit_b0 Unet/efficientnet-b0 FPN/efficientnet-b0
DeepLabV3Plus/efficientnet-b0 Unet/mobileone_s0 FPN/mobileone_s0 Unet/densenet121 Unet/dpn68
Unet/vgg11_bn Unet/xception Unet/inceptionv4 Unet/se_resnet50 Unet/timm-regnetx_002 Unet/mit_b0
UPerNet/mit_b0 Unet/tu-convnext_atto FPN/tu-repvgg_a0 DPT/tu-vit_tiny_patch16_224@224
"""

SPANDREL: dict[str, dict[str, Any]] = {
    "Compact": {"num_conv": 4},
    "ESRGAN": {"num_blocks": 2},
    "ESRGAN:ESRGAN+": {"num_blocks": 2, "plus": True},
    "ESRGAN:ESRGAN norm": {"num_blocks": 2, "norm": "batch"},
    "SPAN": {"num_in_ch": 3, "num_out_ch": 3},
    "SPAN:SPAN without norm": {"num_in_ch": 3, "num_out_ch": 3, "norm": False},
    "PLKSR": {"n_blocks": 4},
    "PLKSR:PLKSR rect": {"n_blocks": 2, "lk_type": "RectSparsePLK"},
    "PLKSR:RealPLKSR": {"n_blocks": 4},
    "PLKSR:RealPLKSR dysample": {"n_blocks": 2, "dysample": True},
    "RCAN": {"n_resgroups": 2, "n_resblocks": 2},
    "SAFMN": {"dim": 36},
    "SAFMNBCIE": {"dim": 36},
    "SwiftSRGAN": {"num_blocks": 2},
    "DnCNN": {},
    "DRUNet": {"nc": [16, 32, 64, 64]},
    "FBCNN": {},
    "NAFNet": {"enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]},
    "MoSR": {"n_block": 4},
    "MoESR": {"n_blocks": 2},
    "OmniSR": {},
    "SCUNet@64": {"config": [1] * 7},
    "SwinIR": {"depths": [2], "num_heads": [6], "window_size": 8},
    "Swin2SR": {"depths": [2], "num_heads": [6], "window_size": 8},
    "HAT": {"depths": [2], "num_heads": [6], "window_size": 8},
    "DAT": {"depth": [2], "num_heads": [2], "embed_dim": 32},
    "ATD": {"depths": (2,), "num_heads": (6,)},
    "DRCT": {"depths": (2,), "num_heads": (6,), "embed_dim": 60},
    "RGT": {"depth": [2], "num_heads": [2], "embed_dim": 32},
    "CRAFT": {"depths": [1], "num_heads": [6]},
    "DCTLSA": {},
    "DITN": {"ITL_blocks": 1, "SAL_blocks": 1},
    "FDAT": {"num_groups": 1, "depth_per_group": 2},
    "FFTformer": {"num_blocks": [1, 1, 1], "num_refinement_blocks": 1},
    "HVICIDNet": {},
    "KBNet:KBNet_s": {"width": 16, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]},
    "MixDehazeNet@64": {},
    "RetinexFormer": {"stage": 1},
    "RealCUGAN:UpCunet2x": {},
    "RealCUGAN:UpCunet2x_fast@96": {},
    "RealCUGAN:UpCunet4x": {},
    "LaMa": {"in_nc": 4},
    "Uformer@128": {"img_size": 128, "depths": [1] * 9},
    "extra MIRNet2": {"n_feat": 32, "n_MRB": 1},
    "extra MPRNet": {"n_feat": 16, "scale_unetfeats": 8, "scale_orsnetfeats": 8, "num_cab": 1},
    "extra Restormer": {"num_blocks": [1, 1, 1, 1], "dim": 24, "num_refinement_blocks": 1},
    "extra M3SNet": {"enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]},
    "extra SRFormer": {"depths": (2,), "num_heads": (6,), "window_size": 8},
}

PYTORCHCV = """
mobilenet_wd4 resnet10 preresnet10 seresnet10 sepreresnet10 ibn_resnet50 airnet50_1x64d_r2
bam_resnet18 cbam_resnet18 resattnet56 sknet50 scnet50 diaresnet10 diapreresnet10 diracnet18v2
sharesnet18 condensenet74_c4_g4 sparsenet121 peleenet drnc26 dpn68 darknet_tiny channelnet
revnet38 irevnet301 bagnet9 dla34 msdnet22 fishnet99 espnetv2_wd2 dicenet_wd5 vovnet27s
hardnet39ds xdensenet121_2 squeezeresnet_v1_1 sqnxt23_w1 shufflenet_g3_w1 shufflenetv2b_wd2
menet108_8x1_g3 mobilenetb_wd4 fdmobilenet_wd4 igcv3_wd4 darts inceptionv3@299 nasnet_4a1056
efficientnet_b0b nin_cifar10@32 resnet20_cifar10@32 densenet40_k12_cifar10@32 ror3_56_cifar10@32
rir_cifar10@32 resdropresnet20_cifar10@32 shakeshakeresnet20_2x16d_cifar10@32 octresnet10_ad2
isqrtcovresnet18 fastscnn_cityscapes pspnet_resnetd50b_voc@128 deeplabv3_resnetd50b_voc@128
icnet_resnetd50b_cityscapes cgnet_cityscapes dabnet_cityscapes sinet_cityscapes@256
bisenet_resnet18_celebamaskhq danet_resnetd50b_cityscapes@128 fpenet_cityscapes ctxnet_cityscapes
lednet_cityscapes@256 esnet_cityscapes edanet_cityscapes enet_cityscapes erfnet_cityscapes
linknet_cityscapes segnet_cityscapes unet_cityscapes@128 sqnet_cityscapes
simplepose_resnet18_coco@192 lwopenpose2d_mobilenet_cmupan_coco@192 centernet_resnet18_voc@128
lffd20x5s320v2_widerface@320 superpointnet tresnet_m
"""

FLAT: dict[str, Any] = {"spatial_dims": 2, "in_channels": 3, "out_channels": 4}
SOLID: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 4}
STEPS = {"channels": (8, 16, 32), "strides": (2, 2)}
# Name: options, shape of an image.
MONAI: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "UNet": ({**FLAT, **STEPS, "num_res_units": 2, "norm": "batch"}, (3, 64, 64)),
    "UNet:instance norm": ({**FLAT, **STEPS, "num_res_units": 2}, (3, 64, 64)),
    "UNet:3d": ({**SOLID, **STEPS, "num_res_units": 2, "norm": "batch"}, (1, 32, 32, 32)),
    "BasicUNet": ({**FLAT, "features": (8, 8, 16, 16, 32, 8), "norm": "batch"}, (3, 64, 64)),
    "BasicUNetPlusPlus": (
        {**FLAT, "features": (8, 8, 16, 16, 32, 8), "norm": "batch"},
        (3, 64, 64),
    ),
    "AttentionUnet": ({**FLAT, **STEPS}, (3, 64, 64)),
    "DynUNet": (
        {
            **FLAT,
            "kernel_size": [3, 3, 3],
            "strides": [1, 2, 2],
            "upsample_kernel_size": [2, 2],
            "norm_name": "batch",
            "filters": [8, 16, 32],
        },
        (3, 64, 64),
    ),
    "FlexibleUNet": (
        {
            "in_channels": 3,
            "out_channels": 4,
            "backbone": "efficientnet-b0",
            "pretrained": False,
        },
        (3, 64, 64),
    ),
    "FlexibleUNet:resnet": (
        {"in_channels": 3, "out_channels": 4, "backbone": "resnet18", "pretrained": False},
        (3, 64, 64),
    ),
    "SegResNet": ({**FLAT, "norm": "batch"}, (3, 64, 64)),
    "SegResNet:3d": ({**SOLID, "norm": "batch"}, (1, 32, 32, 32)),
    "SegResNetDS": ({**FLAT, "init_filters": 8, "norm": "batch"}, (3, 64, 64)),
    "VNet": ({**FLAT, "in_channels": 1}, (1, 64, 64)),
    "AHNet": ({"spatial_dims": 2, "in_channels": 3, "out_channels": 4}, (3, 128, 128)),
    "HighResNet": ({**FLAT, "norm_type": "batch"}, (3, 32, 32)),
    "HoVerNet": ({"mode": "fast", "in_channels": 3}, (3, 256, 256)),
    "DenseNet121": (FLAT, (3, 64, 64)),
    "DenseNet121:3d": (SOLID, (1, 32, 32, 32)),
    "SEResNet50": ({"spatial_dims": 2, "in_channels": 3, "num_classes": 4}, (3, 64, 64)),
    "EfficientNetBN": (
        {"model_name": "efficientnet-b0", "pretrained": False, "in_channels": 3},
        (3, 64, 64),
    ),
    "resnet18": ({"spatial_dims": 2, "n_input_channels": 3, "num_classes": 4}, (3, 64, 64)),
    "resnet18:3d": ({"spatial_dims": 3, "n_input_channels": 1, "num_classes": 4}, (1, 32, 32, 32)),
    "resnet50": ({"spatial_dims": 2, "n_input_channels": 3, "num_classes": 4}, (3, 64, 64)),
    "AutoEncoder": ({**FLAT, **STEPS, "strides": (2, 2, 1), "norm": "batch"}, (3, 64, 64)),
    "Discriminator": ({"in_shape": (3, 64, 64), **STEPS, "norm": "batch"}, (3, 64, 64)),
    "PatchDiscriminator": ({**FLAT, "channels": 16, "out_channels": 1}, (3, 64, 64)),
    "TorchVisionFCModel": ({"model_name": "resnet18", "pretrained": False}, (3, 224, 224)),
    "MedNeXtS": (FLAT, (3, 64, 64)),
    "SwinUNETR": ({**FLAT, "feature_size": 12}, (3, 64, 64)),
    "UNETR": (
        {**FLAT, "img_size": 64, "hidden_size": 96, "mlp_dim": 192, "num_heads": 4},
        (3, 64, 64),
    ),
    "VoxelMorphUNet": (
        {
            "spatial_dims": 2,
            "in_channels": 2,
            "unet_out_channels": 8,
            "channels": (8, 8, 8, 8, 8, 8),
            "final_conv_channels": (8, 8),
        },
        (2, 64, 64),
    ),
}

DOCTR = """
classification/mobilenet_v3_small classification/mobilenet_v3_large
classification/mobilenet_v3_small_r classification/resnet18 classification/resnet31
classification/resnet34_wide classification/resnet50 classification/magc_resnet31
classification/vgg16_bn_r classification/textnet_tiny classification/starnet_s3
classification/vit_s classification/vip_tiny detection/db_resnet50@256
detection/db_mobilenet_v3_large@256 detection/linknet_resnet18@256 detection/fast_tiny@256
detection/fast_base@256 recognition/crnn_vgg16_bn recognition/crnn_mobilenet_v3_small
recognition/sar_resnet31 recognition/vitstr_small recognition/viptr_tiny recognition/parseq
"""

# Module and class, options, shape of an image.
KORNIA: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "TFeat": ("kornia.feature:TFeat", {"pretrained": False}, (1, 32, 32)),
    "HardNet": ("kornia.feature:HardNet", {"pretrained": False}, (1, 32, 32)),
    "HardNet8": ("kornia.feature:HardNet8", {"pretrained": False}, (1, 32, 32)),
    "HyNet": ("kornia.feature:HyNet", {"pretrained": False}, (1, 32, 32)),
    "SOSNet": ("kornia.feature:SOSNet", {"pretrained": False}, (1, 32, 32)),
    "KeyNet": ("kornia.feature:KeyNet", {"pretrained": False}, (1, 64, 64)),
    "XFeatModel": ("kornia.feature:XFeatModel", {}, (3, 96, 96)),
    "DexiNed": ("kornia.models.dexined:DexiNed", {"pretrained": False}, (3, 96, 96)),
    "YuNet": (
        "kornia.models.yunet.model:YuNet",
        {"phase": "test", "pretrained": False},
        (3, 128, 128),
    ),
    "TinyViT": ("kornia.models.tiny_vit:TinyViT", {"depths": [1, 1, 1, 1]}, (3, 224, 224)),
    "RRDBNet": (
        "kornia.models.rrdbnet:RRDBNet",
        {"num_block": 1, "num_in_ch": 3, "num_out_ch": 3},
        (3, 32, 32),
    ),
    "EfficientViT": (
        "kornia.models.efficient_vit.backbone:efficientvit_backbone_b0",
        {},
        (3, 96, 96),
    ),
}

EFFICIENTNET = "efficientnet-b0 efficientnet-b1 efficientnet-b2"

OPEN_CLIP = (
    "MobileCLIP-S1 MobileCLIP-S2 MobileCLIP2-S0 MobileCLIP2-S3 RN50 RN101 RN50x4 convnext_tiny"
)

SUPER_GRADIENTS = """
yolo_nas_s yolo_nas_m yolox_n yolox_s ssd_lite_mobilenet_v2@320 yolo_nas_pose_n repvgg_a0 resnet18
mobilenet_v2 mobilenet_v3_small regnetY200 shufflenet_v2_x0_5 densenet121 pp_lite_t_seg50@256
stdc1_seg50@256 ddrnet_23_slim@256 regseg48@256 segformer_b0@128 shelfnet18_lw@256
"""


@dataclass(frozen=True)
class Entry:
    library: str
    name: str
    size: int
    build: Callable[[Entry], Built]

    @property
    def key(self) -> str:
        return f"{self.library}/{self.name}"

    def image(self, channels: int = 3) -> Tensor:
        return torch.randn(2, channels, self.size, self.size)


def timm(entry: Entry) -> Built:
    model = of("timm:create_model")(entry.name)
    config = model.pretrained_cfg
    size = config["input_size"][-1] if config.get("fixed_input_size") else entry.size
    return model, (torch.randn(2, 3, size, size),)


def torchvision(entry: Entry) -> Built:
    options: dict[str, Any] = {"weights": None}
    if entry.name in of("torchvision.models:list_models")(
        module=of("torchvision.models:detection")
    ):
        # Random scores are low, and with the usual threshold nothing would come out.
        names = {"retinanet", "fcos", "ssd"}
        short = not any(entry.name.startswith(n) for n in names)
        options |= {("box_score_thresh" if short else "score_thresh"): 0.0}
        options |= {("box_detections_per_img" if short else "detections_per_img"): 10}
        if "ssd" not in entry.name:
            options |= {"min_size": 128, "max_size": 128}
        if short:
            options |= {"rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 20}
    if any(
        word in entry.name
        for word in ("rcnn", "retinanet", "fcos", "ssd", "fcn", "deeplab", "lraspp")
    ):
        options["weights_backbone"] = None
    if entry.name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model = of("torchvision.models:get_model")(entry.name, **options)
    if "score_thresh" in str(options):
        return model, ([torch.rand(3, entry.size, entry.size) for _ in range(2)],)
    if entry.name in ("r3d_18", "mc3_18", "r2plus1d_18", "s3d"):
        return model, (
            torch.randn(2, 3, 16, 64, 64)
            if entry.name != "s3d"
            else torch.randn(2, 3, 16, 224, 224),
        )
    if entry.name == "raft_small":
        return model, (entry.image(), entry.image())
    return model, (entry.image(),)


def ultralytics(entry: Entry) -> Built:
    os.environ["YOLO_VERBOSE"] = "False"
    kinds = {"cls": "ClassificationModel", "seg": "SegmentationModel", "pose": "PoseModel"}
    kinds |= {"obb": "OBBModel", "world": "WorldModel", "worldv2": "WorldModel"}
    kinds |= {"sem": "SemanticSegmentationModel", "depth": "DepthModel"}
    words = entry.name.split("-")
    kind = next((kinds[w] for w in words if w in kinds), "DetectionModel")
    if "rtdetr" in words:
        kind = "RTDETRDetectionModel"
    if words[0] == "yoloe":
        kind = "YOLOESegModel" if "seg" in words else "YOLOEModel"
    return of(f"ultralytics.nn.tasks:{kind}")(f"{entry.name}.yaml", verbose=False), (entry.image(),)


def transformers(entry: Entry) -> Built:
    name, options, size = TRANSFORMERS[entry.name]
    kind = of(f"transformers:{name}")
    model = kind(kind.config_class(**options))
    return model, (torch.randn(2, 1 if name.startswith("TextRec") else 3, size, size),)


def segmentation_models_pytorch(entry: Entry) -> Built:
    decoder, encoder = entry.name.split("/")
    make = of(f"segmentation_models_pytorch:{decoder}")
    return make(encoder, encoder_weights=None, classes=4), (entry.image(),)


def spandrel(entry: Entry) -> Built:
    extra = entry.name.startswith("extra ")
    folder, _, kind = entry.name.removeprefix("extra ").partition(":")
    package = "spandrel_extra_arches" if extra else "spandrel"
    name = (kind or folder).split()[0].rstrip("+")
    make = of(f"{package}.architectures.{folder}:{name}")
    model = make(**next(v for k, v in SPANDREL.items() if k.partition("@")[0] == entry.name))
    channels = {"DnCNN": 1, "DRUNet": 1}.get(name, 3)
    x = torch.rand(2, channels, entry.size, entry.size)
    return model, (x, torch.rand_like(x[:, :1])) if name == "LaMa" else (x,)


def pytorchcv(entry: Entry) -> Built:
    options: dict[str, Any] = {"pretrained": False}
    if entry.name.endswith(("_cityscapes", "_voc", "_celebamaskhq", "_coco")):
        options["in_size"] = (entry.size, entry.size)
    model = of("pytorchcv.model_provider:get_model")(entry.name, **options)
    return model, (entry.image(1 if entry.name == "superpointnet" else 3),)


def monai(entry: Entry) -> Built:
    options, shape = MONAI[entry.name]
    return of(f"monai.networks.nets:{entry.name.partition(':')[0]}")(**options), (
        torch.randn(2, *shape),
    )


def doctr(entry: Entry) -> Built:
    part, name = entry.name.split("/")
    options: dict[str, Any] = {"pretrained": False}
    if part == "detection":
        options |= {"pretrained_backbone": False, "exportable": True}
    if part == "recognition":
        options |= {"pretrained_backbone": False, "exportable": True}
        if name in ("vitstr_small", "parseq"):
            del options["pretrained_backbone"]
    model = of(f"doctr.models.{part}:{name}")(**options)
    wide = part == "recognition" or name.endswith(("_r", "31"))
    return model, (torch.rand(2, 3, 32, 128) if wide else entry.image(),)


def kornia(entry: Entry) -> Built:
    name, options, shape = KORNIA[entry.name]
    return of(name)(**options), (torch.rand(2, *shape),)


def efficientnet_pytorch(entry: Entry) -> Built:
    return of("efficientnet_pytorch:EfficientNet.from_name")(entry.name), (entry.image(),)


def open_clip(entry: Entry) -> Built:
    """The image tower; the text tower has no images to merge."""
    model = of("open_clip:create_model")(entry.name, pretrained=None)
    size = model.visual.image_size
    size = size if isinstance(size, int) else size[0]
    return model.visual, (torch.randn(2, 3, size, size),)


def super_gradients(entry: Entry) -> Built:
    """Libraries that it imports, wants old releases of and needs for no model are mocked."""
    os.environ |= {"CRASH_HANDLER": "FALSE", "CONSOLE_LOG_LEVEL": "ERROR"}
    config = "data_gradients.dataset_adapters.config"
    adapters = [
        f"data_gradients.dataset_adapters.{k}_adapter"
        for k in ("base", "classification", "detection", "segmentation")
    ]
    for name in (
        *("onnxsim", "imagesize", "data_gradients", "data_gradients.dataset_adapters", config),
        *(f"{config}.data_config", f"{config}.typing_utils", *adapters),
    ):
        mock = MagicMock()
        mock.__path__, mock.__spec__ = [], None
        sys.modules.setdefault(name, mock)
    get = of("super_gradients.training.models:get")
    branches = {"build_residual_branches": True} if entry.name.startswith("repvgg") else None
    return get(entry.name, num_classes=8, arch_params=branches), (entry.image(),)


def words(text: str) -> list[str]:
    return text.split()


def smp_words() -> list[str]:
    pairs = [d.partition("@") for d in words(SMP_DECODERS)]
    encoders = ("resnet18", "mobilenet_v2")
    return [f"{d}/{e}{at}{size}" for e in encoders for d, at, size in pairs] + words(SMP_OTHERS)


# Names, usual size of an image and builder of each library.
LIBRARIES: dict[str, tuple[list[str], int, Callable[[Entry], Built]]] = {
    "timm": (words(TIMM), 96, timm),
    "torchvision": (words(TORCHVISION), 96, torchvision),
    "ultralytics": (words(ULTRALYTICS), 128, ultralytics),
    "transformers": (list(TRANSFORMERS), 0, transformers),
    "segmentation_models_pytorch": (smp_words(), 96, segmentation_models_pytorch),
    "spandrel": (list(SPANDREL), 32, spandrel),
    "pytorchcv": (words(PYTORCHCV), 224, pytorchcv),
    "monai": (list(MONAI), 0, monai),
    "super_gradients": (words(SUPER_GRADIENTS), 128, super_gradients),
    "doctr": (words(DOCTR), 64, doctr),
    "kornia": (list(KORNIA), 0, kornia),
    "efficientnet_pytorch": (words(EFFICIENTNET), 96, efficientnet_pytorch),
    "open_clip": (words(OPEN_CLIP), 0, open_clip),
}


def entries() -> list[Entry]:
    found = []
    for library, (names, usual, build) in LIBRARIES.items():
        for word in names:
            name, _, size = word.partition("@")
            found.append(Entry(library, name, int(size or usual), build))
    return found

"""A pytest plugin for lightly's own tests: its losses are our classes of the same names."""

import lightly.loss
import lightly.loss.barlow_twins_loss
import lightly.loss.emp_ssl_loss
import lightly.loss.vicreg_loss
import lightly.loss.vicregl_loss

from bagssl_fast.integrations import lightly as ours

lightly.loss.VICRegLoss = ours.VICRegLoss
lightly.loss.vicreg_loss.VICRegLoss = ours.VICRegLoss
lightly.loss.vicregl_loss.VICRegLoss = ours.VICRegLoss
lightly.loss.BarlowTwinsLoss = ours.BarlowTwinsLoss
lightly.loss.barlow_twins_loss.BarlowTwinsLoss = ours.BarlowTwinsLoss
lightly.loss.EMPSSLLoss = ours.EMPSSLLoss
lightly.loss.emp_ssl_loss.EMPSSLLoss = ours.EMPSSLLoss

################################################################################
#
# nvidia-open
#
################################################################################

# CUDA 13, which torch's wheels are built for, needs 580 or later.
NVIDIA_OPEN_VERSION = 580.159.03
NVIDIA_OPEN_SITE = https://download.nvidia.com/XFree86/Linux-x86_64/$(NVIDIA_OPEN_VERSION)
NVIDIA_OPEN_SOURCE = NVIDIA-Linux-x86_64-$(NVIDIA_OPEN_VERSION).run
NVIDIA_OPEN_LICENSE = MIT or GPL-2.0 (modules), NVIDIA Software License (libraries, firmware)
NVIDIA_OPEN_LICENSE_FILES = LICENSE
NVIDIA_OPEN_REDISTRIBUTE = NO

# The archive unpacks itself, but only into a folder that is not there yet.
define NVIDIA_OPEN_EXTRACT_CMDS
	$(SHELL) $(NVIDIA_OPEN_DL_DIR)/$(NVIDIA_OPEN_SOURCE) --extract-only \
		--target $(@D)/unpacked
	chmod -R u+w $(@D)/unpacked
	mv $(@D)/unpacked/* $(@D)
	rm -rf $(@D)/unpacked
endef

NVIDIA_OPEN_MODULE_SUBDIRS = kernel-open
NVIDIA_OPEN_MODULE_MAKE_OPTS = \
	NV_KERNEL_SOURCES="$(LINUX_DIR)" \
	NV_KERNEL_OUTPUT="$(LINUX_DIR)" \
	NV_KERNEL_MODULES="nvidia nvidia-uvm" \
	NV_SPECTRE_V2=0

NVIDIA_OPEN_LIBRARIES = $(addsuffix .so.$(NVIDIA_OPEN_VERSION), \
	libcuda libnvidia-ml libnvidia-nvvm libnvidia-ptxjitcompiler)

# A library, and the name by which it is asked for
define NVIDIA_OPEN_INSTALL_LIBRARY
	$(INSTALL) -D -m 0644 $(@D)/$(1) $(TARGET_DIR)/usr/lib/$(1)
	ln -sf $(1) $(TARGET_DIR)/usr/lib/$$($(TARGET_READELF) -d $(@D)/$(1) \
		| sed -n 's/.*(SONAME).*\[\(.*\)\]/\1/p')
endef

define NVIDIA_OPEN_INSTALL_TARGET_CMDS
	$(foreach library,$(NVIDIA_OPEN_LIBRARIES),
		$(call NVIDIA_OPEN_INSTALL_LIBRARY,$(library))
	)
	mkdir -p $(TARGET_DIR)/lib/firmware/nvidia/$(NVIDIA_OPEN_VERSION)
	$(INSTALL) -m 0644 $(@D)/firmware/gsp_*.bin \
		$(TARGET_DIR)/lib/firmware/nvidia/$(NVIDIA_OPEN_VERSION)
endef

$(eval $(kernel-module))
$(eval $(generic-package))

# The time of every file and build: two builds are alike only if it is fixed. Buildroot's own value
# is the date of its tree.
ifeq ($(origin SOURCE_DATE_EPOCH),file)
SOURCE_DATE_EPOCH = 1767225600
endif

# PID 1 is named on the command line; Buildroot would add an /init.
ROOTFS_CPIO_PRE_GEN_HOOKS := $(filter-out ROOTFS_CPIO_ADD_INIT,$(ROOTFS_CPIO_PRE_GEN_HOOKS))

include $(sort $(wildcard $(BR2_EXTERNAL_MUENCLAVE_PATH)/package/*/*.mk))

ifeq ($(BR2_PACKAGE_MUENCLAVE),y)
LINUX_PRE_BUILD_HOOKS += MUENCLAVE_CHECK_KERNEL
LINUX_POST_INSTALL_IMAGES_HOOKS += MUENCLAVE_INSTALL_KERNEL_FACTS
endif

# CycloneDX. Where there is no network, the SPDX schema has to lie in the download folder.
.PHONY: muenclave-sbom
muenclave-sbom:
	$(Q)mkdir -p $(BINARIES_DIR)
	$(Q)$(MAKE1) -s --no-print-directory $(EXTRAMAKEARGS) show-info > $(BINARIES_DIR)/packages.json
	$(Q)utils/generate-cyclonedx -i $(BINARIES_DIR)/packages.json -o $(BINARIES_DIR)/sbom.cdx.json
